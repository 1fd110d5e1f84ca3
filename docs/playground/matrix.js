// Memory and the one costly operation, the product of matrices: in WebAssembly where the browser has its vectors of
// four numbers (kernel.wat), else in plain JavaScript. The two may differ in the last bits: the kernel sums in float32.

export class Memory {
  /** megabytes: all that a model and its activations may take.  kernel: the bytes of kernel.wasm, or null. */
  constructor(megabytes, kernel = null) {
    const pages = megabytes * 16; // of 64 KiB
    if (kernel) {
      const memory = new WebAssembly.Memory({ initial: pages, maximum: pages });
      this.kernel = new WebAssembly.Instance(new WebAssembly.Module(kernel), { env: { memory } }).exports;
      this.buffer = memory.buffer;
    } else {
      this.kernel = null;
      this.buffer = new ArrayBuffer(pages * 65536);
    }
    this.used = 16; // bytes; what is set back to an earlier value is free again
  }

  /** A new Float32Array of `count` numbers, of any content. */
  floats(count) {
    if (this.used + 4 * count > this.buffer.byteLength) {
      throw new Error(`${this.buffer.byteLength >> 20} MB are full: shorten the text, or take smaller batches`);
    }
    const array = new Float32Array(this.buffer, this.used, count);
    this.used += (4 * count + 15) & ~15;
    return array;
  }

  zeros(count) {
    return this.floats(count).fill(0);
  }

  copy(values) {
    const array = this.floats(values.length);
    array.set(values);
    return array;
  }

  /** What `compute` returns, and the memory that it took is free again: it returns nothing that lies in here. */
  within(compute) {
    const used = this.used;
    try {
      return compute();
    } finally {
      this.used = used;
    }
  }

  /** A weight (out, in), as nn.Linear keeps it, laid out for `multiply` as the matrix of x ↦ x Wᵀ; `back`: of
   *  dy ↦ dy W. Panels of eight columns, one behind the other: what the kernel reads lies side by side. */
  pack({ shape: [outs, ins], data }, back = false) {
    const [K, N] = back ? [outs, ins] : [ins, outs], packed = this.floats(K * N);
    if (N % 8) throw new Error(`a matrix of ${N} columns; needed is a multiple of 8`);
    for (let n = 0, p = 0; n < N; n += 8) {
      for (let k = 0; k < K; k++) {
        for (let j = n; j < n + 8; j++) packed[p++] = back ? data[k * ins + j] : data[j * ins + k];
      }
    }
    return { data: packed, K, N };
  }

  /** out (rows, N) = x (rows, K) · matrix (K, N), or with `add` out += it. A row's bits do not depend on the others. */
  multiply(out, x, matrix, rows, add = false) {
    const { data, K, N } = matrix;
    if (this.kernel) {
      this.kernel.multiply(out.byteOffset, x.byteOffset, data.byteOffset, rows, K, N, add ? 1 : 0);
      return out;
    }
    const sum = new Float64Array(8);
    for (let n = 0, panel = 0; n < N; n += 8, panel += 8 * K) {
      for (let row = 0; row < rows; row++) {
        for (let j = 0; j < 8; j++) sum[j] = add ? out[row * N + n + j] : 0;
        for (let k = 0, p = panel; k < K; k++, p += 8) {
          const factor = x[row * K + k];
          for (let j = 0; j < 8; j++) sum[j] += factor * data[p + j];
        }
        for (let j = 0; j < 8; j++) out[row * N + n + j] = sum[j];
      }
    }
    return out;
  }
}

/** Σ a[i + n] · b[j + n] over n < count, a multiple of 4: four sums that do not wait for one another. */
export function dot(a, i, b, j, count) {
  let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (const end = i + count; i < end; i += 4, j += 4) {
    s0 += a[i] * b[j];
    s1 += a[i + 1] * b[j + 1];
    s2 += a[i + 2] * b[j + 2];
    s3 += a[i + 3] * b[j + 3];
  }
  return s0 + s1 + (s2 + s3);
}

/** a[i + n] += factor · b[j + n] over n < count, a multiple of 4. */
export function addTo(a, i, factor, b, j, count) {
  for (const end = i + count; i < end; i += 4, j += 4) {
    a[i] += factor * b[j];
    a[i + 1] += factor * b[j + 1];
    a[i + 2] += factor * b[j + 2];
    a[i + 3] += factor * b[j + 3];
  }
}
