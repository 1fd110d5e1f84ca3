// What the frozen LLaMA sees: minillama/vision.py and adapters/image_prompt.py once more, with the same names.
//
//     strokes ─▶ picture ─▶ 3 × 3 convolution ─▶ patches ─▶ linear ─▶ norm ─▶ features (N, F)
//                                                                               │ projection
//                                                              prompts (K, D) ─▶ +   as in llama.js from here on
//
// Shapes: N tiles of 8 × 8 pixels, a digit each and one behind the other; F features, K = N prompts, D model width.
import { dot } from "./matrix.js";

export const SIDE = 8; // of a tile, in pixels

export class Encoder {
  /** tensors: {name: {shape, data}} of bases/vision/handwriting.safetensors, whose head is not used. */
  constructor(tensors, memory) {
    this.memory = memory;
    const linear = (name) => {
      const { shape: [outs, ...ins], data } = tensors[`${name}.weight`];
      const weight = memory.pack({ shape: [outs, ins.reduce((a, b) => a * b)], data });
      return { weight, bias: tensors[`${name}.bias`].data };
    };
    for (const name of ["strokes", "patches", "hidden", "look"]) this[name] = linear(name);
    this.F = this.look.bias.length;
  }

  /** x (rows, in) -> x Wᵀ + b (rows, out). */
  linear({ weight, bias }, x, rows) {
    const out = this.memory.floats(rows * bias.length);
    for (let row = 0; row < rows; row++) out.set(bias, row * bias.length);
    return this.memory.multiply(out, x, weight, rows, true);
  }

  /** The squares of size × size pixels that a convolution multiplies: x (N, side, side, C) -> (N·places², C·size²), a
   *  place every `stride` pixels, from `padding` outside of the tile on. */
  squares(x, N, side, C, { size, stride, padding }) {
    const places = (side + 2 * padding - size) / stride + 1, out = this.memory.zeros(N * places ** 2 * C * size ** 2);
    let at = 0;
    for (let n = 0; n < N; n++) {
      for (let place = 0; place < places ** 2; place++) {
        const top = Math.floor(place / places) * stride - padding, left = (place % places) * stride - padding;
        for (let c = 0; c < C; c++) {
          for (let i = 0; i < size ** 2; i++, at++) {
            const row = top + Math.floor(i / size), column = left + (i % size);
            const inside = row >= 0 && row < side && column >= 0 && column < side;
            if (inside) out[at] = x[((n * side + row) * side + column) * C + c];
          }
        }
      }
    }
    return out;
  }

  /** Tiles (N, 8, 8), ink from 0 to 1 -> features (N, F), each of mean 0 and variance 1. */
  forward(tiles) {
    const { memory, F } = this, N = tiles.length / SIDE ** 2, half = SIDE / 2, C = this.patches.bias.length;
    return memory.within(() => {
      const squares = this.squares(tiles, N, SIDE, 1, { size: 3, stride: 1, padding: 1 });
      const strokes = relu(this.linear(this.strokes, squares, N * SIDE ** 2)); // (N, 8, 8, 16)
      const pairs = this.squares(strokes, N, SIDE, 16, { size: 2, stride: 2, padding: 0 });
      const patches = relu(this.linear(this.patches, pairs, N * half ** 2)); // (N, 4, 4, C)
      const flat = memory.floats(patches.length); // (N, C · 4 · 4), as PyTorch has it: channels first
      patches.forEach((value, i) => {
        const c = i % C, place = Math.floor(i / C) % half ** 2, n = Math.floor(i / C / half ** 2);
        flat[(n * C + c) * half ** 2 + place] = value;
      });
      const hidden = relu(this.linear(this.hidden, flat, N));
      return layer_norm(this.linear(this.look, hidden, N), F).slice(); // (N, F)
    });
  }
}

function relu(x) {
  for (let i = 0; i < x.length; i++) if (x[i] < 0) x[i] = 0;
  return x;
}

function layer_norm(x, F, eps = 1e-5) {
  for (let start = 0; start < x.length; start += F) {
    const row = x.subarray(start, start + F), mean = row.reduce((sum, value) => sum + value, 0) / F;
    const variance = row.reduce((sum, value) => sum + (value - mean) ** 2, 0) / F;
    for (let i = 0; i < F; i++) row[i] = (row[i] - mean) / Math.sqrt(variance + eps);
  }
  return x;
}

/** An image_prompt adapter that sees features (N, F): its prompts are P_l + projection(features), (K, D) each. */
export function seeing({ projection: { weight, bias }, prompts, ...adapter }, features) {
  const D = bias.length, F = weight.length / D;
  const shown = Float32Array.from({ length: prompts[0].length }, (_, i) => {
    return bias[i % D] + dot(weight, (i % D) * F, features, Math.floor(i / D) * F, F);
  });
  return { ...adapter, prompts: prompts.map((prompt) => prompt.map((value, i) => value + shown[i])) };
}

// ── a reader's own digits ────────────────────────────────────────────────────────────────────────────────────────────

const BITMAP = 32, WIDE = 20, PEN = 5; // pixels: the bitmap's side, the widest digit on it, a stroke's width

/** Strokes, lists of points [x, y], of one digit -> its picture (8, 8), counts from 0 to 16, as the UCI digits were
 *  made: set upright, brought to 32 × 32 black or white pixels, of which each block of 4 × 4 is counted. */
export function picture_of(strokes) {
  const points = upright(evenly(strokes));
  const [left, right, top, bottom] = [0, 1].flatMap((i) => {
    const all = points.map((point) => point[i]);
    return [Math.min(...all), Math.max(...all)];
  });
  const scaleY = (BITMAP - PEN) / Math.max(bottom - top, 1e-9);
  const scaleX = Math.min(scaleY, (WIDE - PEN) / Math.max(right - left, 1e-9));
  const placed = points.map(([x, y]) => {
    return [BITMAP / 2 + (x - (left + right) / 2) * scaleX, BITMAP / 2 + (y - (top + bottom) / 2) * scaleY];
  });
  const counts = new Uint8Array(SIDE ** 2), block = BITMAP / SIDE;
  for (let row = 0; row < BITMAP; row++) {
    for (let column = 0; column < BITMAP; column++) {
      const black = placed.some(([x, y]) => (x - column - 0.5) ** 2 + (y - row - 0.5) ** 2 <= (PEN / 2) ** 2);
      if (black) counts[Math.floor(row / block) * SIDE + Math.floor(column / block)]++;
    }
  }
  return counts;
}

/** Points along strokes, 64 to the digit's longer side: a hand that slows down leaves no more of them. */
function evenly(strokes) {
  const extent = [0, 1].map((i) => {
    const all = strokes.flat().map((point) => point[i]);
    return Math.max(...all) - Math.min(...all);
  });
  const step = Math.max(...extent, 1e-9) / 64;
  return strokes.flatMap((stroke) => {
    return stroke.flatMap(([x, y], i) => {
      const [fromX, fromY] = stroke[Math.max(0, i - 1)], count = Math.ceil(Math.hypot(x - fromX, y - fromY) / step);
      if (i === 0) return [[x, y]];
      const between = (n) => [fromX + ((x - fromX) * n) / count, fromY + ((y - fromY) * n) / count];
      return Array.from({ length: count }, (_, n) => between(n + 1));
    });
  });
}

/** Sheared so that the points lean neither way (least squares of x by y), by 45° at most. */
function upright(points) {
  const mean = [0, 1].map((i) => points.reduce((sum, point) => sum + point[i], 0) / points.length);
  let along = 0, square = 1e-9;
  for (const [x, y] of points) {
    along += (x - mean[0]) * (y - mean[1]);
    square += (y - mean[1]) ** 2;
  }
  const lean = Math.max(-1, Math.min(1, along / square));
  return points.map(([x, y]) => [x - lean * (y - mean[1]), y]);
}
