// Training gated prefix attention: the loss, its gradient with respect to prompts and gates alone, and the step of
// AdamW that minillama/train.py makes. The base's weights are read, never changed. Shapes: see llama.js.
//
// The backward pass walks the layers from the last to the first. Where the forward pass multiplied by W, it multiplies
// by Wᵀ (`back`); below the lowest prompts nothing need be known, so it ends there.
import { addTo, dot } from "./matrix.js";

/** The sum of the loss over a batch's answer tokens and its gradient.
 *
 * adapter: {K, flat, prompts, gates} (`adapterOf`).  batch: rows {prompt, answer} of ids.
 * Returns {loss, count, right, gradient}: nats and tokens (loss / count is the mean), rows without a wrong token, and
 * d loss / d flat (L·K·D + L·H). */
export function lossAndGradient(model, adapter, batch) {
  return model.memory.within(() => {
    const { memory, L, H, D, V } = model, opened = model.open(adapter);
    const rows = batch.map(({ prompt, answer }) => [...prompt, ...answer].slice(0, -1));
    const run = model.forward(rows, { adapter: opened, keep: true }), { N } = run;

    // What stands at `places` must say `targets`: each token of an answer is read from the one before it.
    const places = [], targets = [], rowOf = [];
    let start = 0;
    batch.forEach(({ prompt, answer }, row) => {
      answer.forEach((id, i) => {
        places.push(start + prompt.length - 1 + i);
        targets.push(id);
        rowOf.push(row);
      });
      start += rows[row].length;
    });
    const n = places.length, picked = memory.floats(n * D), hidden = memory.floats(n * D), scales = memory.floats(n);
    places.forEach((place, i) => picked.set(run.x.subarray(place * D, (place + 1) * D), i * D));
    model.rms_norm(hidden, picked, model.norm, n, scales);
    const logits = memory.multiply(memory.floats(n * V), hidden, model.lm_head.forward, n);
    const { loss, wrong } = crossEntropy(logits, targets, V); // logits are now d loss / d logits
    const dHidden = memory.multiply(memory.floats(n * D), logits, model.lm_head.back, n);
    const dPicked = memory.zeros(n * D), dx = memory.zeros(N * D);
    rmsNormBack(dPicked, dHidden, picked, model.norm, scales, n, D);
    places.forEach((place, i) => dx.set(dPicked.subarray(i * D, (i + 1) * D), place * D));

    const gradient = new Float32Array(adapter.flat.length), views = adapterOf(model, adapter.K, gradient);
    for (let l = L - 1; l >= 0; l--) {
      const dGates = views.gates.subarray(l * H, (l + 1) * H);
      memory.within(() => layerBack(model, l, run, opened, dx, views.prompts[l], dGates));
    }
    return { loss, count: n, right: batch.length - new Set(rowOf.filter((_, i) => wrong[i])).size, gradient };
  });
}

/** Σ −ln softmax(logits)[target] over the rows of logits (n, V), which become its gradient; and which rows' likeliest
 *  token is not the target. */
function crossEntropy(logits, targets, V) {
  let loss = 0;
  const wrong = targets.map((target, i) => {
    const row = logits.subarray(i * V, (i + 1) * V);
    let best = 0, sum = 0;
    for (let j = 1; j < V; j++) if (row[j] > row[best]) best = j;
    const most = row[best];
    for (let j = 0; j < V; j++) sum += Math.exp(row[j] - most);
    loss += Math.log(sum) + most - row[target];
    for (let j = 0; j < V; j++) row[j] = Math.exp(row[j] - most) / sum - (j === target ? 1 : 0);
    return best !== target;
  });
  return { loss, wrong };
}

/** One layer: dx (N, D) is the gradient of its output and becomes that of its input; dPrompt (K, D) and dGates (H,) are
 *  written. */
function layerBack(model, l, run, opened, dx, dPrompt, dGates) {
  const { memory, D, F, H, G, d } = model, { N, lengths, positions } = run, { K } = opened;
  const layer = model.layers[l], kept = run.layers[l], prefix = opened.prefixes[l];
  const openings = opened.openings.subarray(l * H, (l + 1) * H), normed = memory.floats(N * D);

  // middle + down(silu(gate) · up)
  const dHidden = memory.multiply(memory.floats(N * F), dx, layer.down_proj.back, N);
  const dGate = memory.floats(N * F), dUp = memory.floats(N * F);
  for (let i = 0; i < N * F; i++) {
    const silu = kept.gate[i] * kept.sigmoid[i];
    dUp[i] = dHidden[i] * silu;
    dGate[i] = dHidden[i] * kept.up[i] * kept.sigmoid[i] * (1 + kept.gate[i] - silu);
  }
  memory.multiply(normed, dGate, layer.gate_proj.back, N);
  memory.multiply(normed, dUp, layer.up_proj.back, N, true);
  rmsNormBack(dx, normed, kept.middle, layer.post_attention_layernorm, kept.scales2, N, D);

  // x + output(attend(tokens) + opening · attend(prompts))
  const dy = memory.multiply(memory.floats(N * H * d), dx, layer.o_proj.back, N);
  const dq = memory.zeros(N * H * d), dk = memory.zeros(N * G * d), dv = memory.zeros(N * G * d);
  const dPrefix = { k: memory.zeros(K * G * d), v: memory.zeros(K * G * d) }, below = l > 0;
  let start = 0;
  lengths.forEach((T, r) => {
    const cut = (array, width) => array.subarray(start * width, (start + T) * width);
    const q = cut(kept.q, H * d), dY = cut(dy, H * d), dQ = cut(dq, H * d);
    attendBack(model, kept.onPrompts[r], { q, ...prefix }, dY, { q: dQ, ...dPrefix }, T, K, openings, dGates);
    if (below) {
      const tokens = { k: cut(kept.k, G * d), v: cut(kept.v, G * d) };
      attendBack(model, kept.onTokens[r], { q, ...tokens }, dY, { q: dQ, k: cut(dk, G * d), v: cut(dv, G * d) }, T, T);
    }
    start += T;
  });
  const ofPrompt = memory.multiply(memory.floats(K * D), dPrefix.k, layer.k_proj.back, K);
  dPrompt.set(memory.multiply(ofPrompt, dPrefix.v, layer.v_proj.back, K, true));
  for (let h = 0; h < H; h++) dGates[h] *= 1 - openings[h] ** 2; // through tanh
  if (!below) return;
  model.rotate(dq, H, positions, -1);
  model.rotate(dk, G, positions, -1);
  memory.multiply(normed, dq, layer.q_proj.back, N);
  memory.multiply(normed, dk, layer.k_proj.back, N, true);
  memory.multiply(normed, dv, layer.v_proj.back, N, true);
  rmsNormBack(dx, normed, kept.x, layer.input_layernorm, kept.scales1, N, D);
}

/** Through `attend` of one row: adds to the gradients to.q, to.k, to.v of from.q, from.k, from.v, and where there are
 *  openings, to dOpenings (H,), whose gradient is Σ dy · term. */
function attendBack({ H, G, d }, weights, from, dy, to, T, S, openings = null, dOpenings = null) {
  const root = 1 / Math.sqrt(d), dWeights = new Float64Array(S);
  for (let h = 0; h < H; h++) {
    const group = Math.floor((h * G) / H) * d, opening = openings ? openings[h] : 1;
    for (let t = 0; t < T; t++) {
      const seen = openings ? S : t + 1, row = (h * T + t) * S, at = (t * H + h) * d;
      let mean = 0;
      for (let s = 0; s < seen; s++) {
        dWeights[s] = dot(dy, at, from.v, s * G * d + group, d);
        mean += weights[row + s] * dWeights[s];
      }
      if (openings) dOpenings[h] += mean;
      for (let s = 0; s < seen; s++) {
        const weight = opening * weights[row + s], dScore = weight * (dWeights[s] - mean) * root;
        const key = s * G * d + group;
        addTo(to.v, key, weight, dy, at, d);
        addTo(to.k, key, dScore, from.q, at, d);
        addTo(to.q, at, dScore, from.k, key, d);
      }
    }
  }
}

/** Through RMSNorm: dx (N, D) += the gradient of x, where dOut is that of the norm's output. */
function rmsNormBack(dx, dOut, x, weight, scales, N, D) {
  for (let t = 0; t < N; t++) {
    const at = t * D, scale = scales[t];
    let along = 0;
    for (let i = 0; i < D; i++) along += dOut[at + i] * weight[i] * x[at + i];
    const shared = (along * scale ** 3) / D;
    for (let i = 0; i < D; i++) dx[at + i] += dOut[at + i] * weight[i] * scale - shared * x[at + i];
  }
}

/** AdamW (betas 0.9 and 0.99, no decay), gradients clipped to norm 1, warm-up and half a cosine, as in train.py. */
export class AdamW {
  constructor(count, { steps, peak = 0.1, warmup = 0.1, clip = 1 }) {
    Object.assign(this, { steps, peak, warmup, clip, step: 0, m: new Float64Array(count), v: new Float64Array(count) });
  }

  learningRate() {
    const rising = Math.max(1, Math.round(this.steps * this.warmup));
    if (this.step < rising) return (this.peak * (this.step + 1)) / rising;
    return this.peak * 0.5 * (1 + Math.cos((Math.PI * (this.step - rising)) / Math.max(1, this.steps - rising)));
  }

  /** Moves the parameters one step against the gradient of the mean loss; returns the gradient's norm. */
  update(parameters, gradient) {
    const rate = this.learningRate(), norm = Math.sqrt(gradient.reduce((sum, g) => sum + g * g, 0));
    if (!Number.isFinite(norm)) throw new Error("the gradient became NaN or infinite: take a lower learning rate");
    const shrink = Math.min(1, this.clip / (norm + 1e-6));
    this.step++;
    const correction1 = 1 - 0.9 ** this.step, correction2 = 1 - 0.99 ** this.step;
    for (let i = 0; i < gradient.length; i++) {
      const g = gradient[i] * shrink;
      this.m[i] = 0.9 * this.m[i] + 0.1 * g;
      this.v[i] = 0.99 * this.v[i] + 0.01 * g * g;
      parameters[i] -= (rate * (this.m[i] / correction1)) / (Math.sqrt(this.v[i] / correction2) + 1e-8);
    }
    return norm;
  }
}

/** The views of flat (L·K·D prompts, then L·H gates) that the model reads. */
export function adapterOf({ L, D, H }, K, flat) {
  const prompts = Array.from({ length: L }, (_, l) => flat.subarray(l * K * D, (l + 1) * K * D));
  return { K, flat, prompts, gates: flat.subarray(L * K * D), tanh: true };
}

/** A new adapter: prompts from N(0, 1), and each gate `gate`, 0 in the paper. */
export function newAdapter(model, { K = 10, seed = 0, gate = 0 } = {}) {
  const { L, D, H } = model, flat = new Float32Array(L * K * D + L * H).fill(gate), { normal } = seeded(seed);
  for (let i = 0; i < L * K * D; i++) flat[i] = normal();
  return adapterOf(model, K, flat);
}

/** Random numbers that a seed repeats: uniform in [0, 1) by mulberry32, and normal by Box and Muller. */
export function seeded(seed) {
  const uniform = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  return { uniform, normal: () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()) };
}
