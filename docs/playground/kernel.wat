;; multiply(out, x, matrix, rows, K, N, add): out (rows, N) = x (rows, K) · matrix (K, N), += where add is 1; float32.
;;
;; The first three are addresses. The matrix lies in panels of eight columns, (K, 8) each, one behind the other
;; (matrix.js, `pack`). Four rows are summed at once, in eight vectors of four numbers, the rows left over one by one;
;; either way each sum runs over k in order, so that a row's bits do not depend on its neighbours.
;;
;; kernel.wasm is made of this text by wabt (apt install wabt):   wat2wasm kernel.wat -o kernel.wasm
(module
  (import "env" "memory" (memory 1))
  (func (export "multiply")
    (param $out i32) (param $x i32) (param $matrix i32) (param $rows i32) (param $K i32) (param $N i32) (param $add i32)
    (local $row i32) (local $column i32) (local $k i32) (local $panel i32) (local $width i32) (local $stride i32)
    (local $x0 i32) (local $x1 i32) (local $x2 i32) (local $x3 i32)              ;; four rows of x
    (local $out0 i32) (local $out1 i32) (local $out2 i32) (local $out3 i32)      ;; and of out
    (local $left v128) (local $right v128) (local $factor v128)      ;; a row of the panel; a number of x, four times
    (local $l0 v128) (local $l1 v128) (local $l2 v128) (local $l3 v128)          ;; the sums: left four columns
    (local $r0 v128) (local $r1 v128) (local $r2 v128) (local $r3 v128)          ;; and right four
    (local.set $width (i32.shl (local.get $K) (i32.const 2)))                    ;; bytes of a row of x
    (local.set $stride (i32.shl (local.get $N) (i32.const 2)))                   ;; and of out
    (loop $panels
      (local.set $row (i32.const 0))
      (local.set $x0 (local.get $x))
      (local.set $out0 (i32.add (local.get $out) (i32.shl (local.get $column) (i32.const 2))))
      (block $fewer_than_four
        (loop $four
          (br_if $fewer_than_four (i32.gt_s (i32.add (local.get $row) (i32.const 4)) (local.get $rows)))
          (local.set $x1 (i32.add (local.get $x0) (local.get $width)))
          (local.set $x2 (i32.add (local.get $x1) (local.get $width)))
          (local.set $x3 (i32.add (local.get $x2) (local.get $width)))
          (local.set $out1 (i32.add (local.get $out0) (local.get $stride)))
          (local.set $out2 (i32.add (local.get $out1) (local.get $stride)))
          (local.set $out3 (i32.add (local.get $out2) (local.get $stride)))
          (if (local.get $add)
            (then
              (local.set $l0 (v128.load (local.get $out0)))
              (local.set $r0 (v128.load offset=16 (local.get $out0)))
              (local.set $l1 (v128.load (local.get $out1)))
              (local.set $r1 (v128.load offset=16 (local.get $out1)))
              (local.set $l2 (v128.load (local.get $out2)))
              (local.set $r2 (v128.load offset=16 (local.get $out2)))
              (local.set $l3 (v128.load (local.get $out3)))
              (local.set $r3 (v128.load offset=16 (local.get $out3))))
            (else
              (local.set $l0 (v128.const i32x4 0 0 0 0))
              (local.set $r0 (v128.const i32x4 0 0 0 0))
              (local.set $l1 (v128.const i32x4 0 0 0 0))
              (local.set $r1 (v128.const i32x4 0 0 0 0))
              (local.set $l2 (v128.const i32x4 0 0 0 0))
              (local.set $r2 (v128.const i32x4 0 0 0 0))
              (local.set $l3 (v128.const i32x4 0 0 0 0))
              (local.set $r3 (v128.const i32x4 0 0 0 0))))
          (local.set $panel (local.get $matrix))
          (local.set $k (i32.const 0))
          (loop $sum
            (local.set $left (v128.load (local.get $panel)))
            (local.set $right (v128.load offset=16 (local.get $panel)))
            (local.set $factor (v128.load32_splat (i32.add (local.get $x0) (local.get $k))))
            (local.set $l0 (f32x4.add (local.get $l0) (f32x4.mul (local.get $factor) (local.get $left))))
            (local.set $r0 (f32x4.add (local.get $r0) (f32x4.mul (local.get $factor) (local.get $right))))
            (local.set $factor (v128.load32_splat (i32.add (local.get $x1) (local.get $k))))
            (local.set $l1 (f32x4.add (local.get $l1) (f32x4.mul (local.get $factor) (local.get $left))))
            (local.set $r1 (f32x4.add (local.get $r1) (f32x4.mul (local.get $factor) (local.get $right))))
            (local.set $factor (v128.load32_splat (i32.add (local.get $x2) (local.get $k))))
            (local.set $l2 (f32x4.add (local.get $l2) (f32x4.mul (local.get $factor) (local.get $left))))
            (local.set $r2 (f32x4.add (local.get $r2) (f32x4.mul (local.get $factor) (local.get $right))))
            (local.set $factor (v128.load32_splat (i32.add (local.get $x3) (local.get $k))))
            (local.set $l3 (f32x4.add (local.get $l3) (f32x4.mul (local.get $factor) (local.get $left))))
            (local.set $r3 (f32x4.add (local.get $r3) (f32x4.mul (local.get $factor) (local.get $right))))
            (local.set $panel (i32.add (local.get $panel) (i32.const 32)))
            (br_if $sum (i32.lt_s (local.tee $k (i32.add (local.get $k) (i32.const 4))) (local.get $width))))
          (v128.store (local.get $out0) (local.get $l0))
          (v128.store offset=16 (local.get $out0) (local.get $r0))
          (v128.store (local.get $out1) (local.get $l1))
          (v128.store offset=16 (local.get $out1) (local.get $r1))
          (v128.store (local.get $out2) (local.get $l2))
          (v128.store offset=16 (local.get $out2) (local.get $r2))
          (v128.store (local.get $out3) (local.get $l3))
          (v128.store offset=16 (local.get $out3) (local.get $r3))
          (local.set $x0 (i32.add (local.get $x3) (local.get $width)))
          (local.set $out0 (i32.add (local.get $out3) (local.get $stride)))
          (local.set $row (i32.add (local.get $row) (i32.const 4)))
          (br $four)))
      (block $none_left
        (loop $one
          (br_if $none_left (i32.ge_s (local.get $row) (local.get $rows)))
          (if (local.get $add)
            (then
              (local.set $l0 (v128.load (local.get $out0)))
              (local.set $r0 (v128.load offset=16 (local.get $out0))))
            (else
              (local.set $l0 (v128.const i32x4 0 0 0 0))
              (local.set $r0 (v128.const i32x4 0 0 0 0))))
          (local.set $panel (local.get $matrix))
          (local.set $k (i32.const 0))
          (loop $sum
            (local.set $left (v128.load (local.get $panel)))
            (local.set $right (v128.load offset=16 (local.get $panel)))
            (local.set $factor (v128.load32_splat (i32.add (local.get $x0) (local.get $k))))
            (local.set $l0 (f32x4.add (local.get $l0) (f32x4.mul (local.get $factor) (local.get $left))))
            (local.set $r0 (f32x4.add (local.get $r0) (f32x4.mul (local.get $factor) (local.get $right))))
            (local.set $panel (i32.add (local.get $panel) (i32.const 32)))
            (br_if $sum (i32.lt_s (local.tee $k (i32.add (local.get $k) (i32.const 4))) (local.get $width))))
          (v128.store (local.get $out0) (local.get $l0))
          (v128.store offset=16 (local.get $out0) (local.get $r0))
          (local.set $x0 (i32.add (local.get $x0) (local.get $width)))
          (local.set $out0 (i32.add (local.get $out0) (local.get $stride)))
          (local.set $row (i32.add (local.get $row) (i32.const 1)))
          (br $one)))
      (local.set $matrix (i32.add (local.get $matrix) (i32.shl (local.get $K) (i32.const 5))))
      (br_if $panels (i32.lt_s (local.tee $column (i32.add (local.get $column) (i32.const 8))) (local.get $N))))))
