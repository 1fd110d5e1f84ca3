// LLaMA and gated prefix attention: minillama/llama.py, attention.py and adapters/llama_adapter.py once more, with the
// same names, so that one can be read beside the other.
//
//     ids ─▶ embed ─▶ ┌ x + attention(norm(x)) ─▶ x + mlp(norm(x)) ┐ × L ─▶ norm ─▶ head ─▶ logits
//                     └────────────────────────────────────────────┘
//
// Shapes: N tokens of all rows together, one row behind the other, so nothing is padded; T tokens of one row, S those
// that it may see; D model width, F width of the MLP, H query heads, G key/value heads, d head width, K prompt tokens,
// V vocabulary, L layers. An array is flat, the last letter runs fastest: q (N, H·d) has head h of token t from
// (t·H + h)·d.
import { addTo, dot } from "./matrix.js";

export class LLaMA {
  /** config: Hugging Face's config.json.  tensors: {name: {shape, data}} (safetensors.js).
   *  trainable: keep each matrix a second time, as the backward pass reads it (train.js). */
  constructor(config, tensors, memory, { trainable = false } = {}) {
    this.memory = memory;
    this.D = config.hidden_size;
    this.F = config.intermediate_size;
    this.L = config.num_hidden_layers;
    this.H = config.num_attention_heads;
    this.G = config.num_key_value_heads;
    this.d = config.head_dim;
    this.V = config.vocab_size;
    this.longest = config.max_position_embeddings;
    this.eps = config.rms_norm_eps;
    const tensor = (name) => tensors[name] ?? tensors[`model.${name}`];
    const linear = (name) => {
      const weight = tensor(`${name}.weight`);
      return { forward: memory.pack(weight), back: trainable ? memory.pack(weight, true) : null };
    };
    this.embed_tokens = tensor("embed_tokens.weight").data; // (V, D)
    this.norm = tensor("norm.weight").data; // (D,)
    this.lm_head = linear("lm_head");
    this.layers = Array.from({ length: this.L }, (_, i) => ({
      input_layernorm: tensor(`layers.${i}.input_layernorm.weight`).data,
      q_proj: linear(`layers.${i}.self_attn.q_proj`),
      k_proj: linear(`layers.${i}.self_attn.k_proj`),
      v_proj: linear(`layers.${i}.self_attn.v_proj`),
      o_proj: linear(`layers.${i}.self_attn.o_proj`),
      post_attention_layernorm: tensor(`layers.${i}.post_attention_layernorm.weight`).data,
      gate_proj: linear(`layers.${i}.mlp.gate_proj`),
      up_proj: linear(`layers.${i}.mlp.up_proj`),
      down_proj: linear(`layers.${i}.mlp.down_proj`),
    }));
    this.rope(config.rope_parameters.rope_theta);
  }

  /** The rotary positions' cosines and sines, (longest, d/2) each; rounded to float32 wherever PyTorch rounds. */
  rope(theta) {
    const half = this.d / 2;
    this.cos = new Float32Array(this.longest * half);
    this.sin = new Float32Array(this.longest * half);
    for (let i = 0; i < half; i++) {
      const frequency = Math.fround(1 / Math.fround(theta ** Math.fround((2 * i) / this.d)));
      for (let t = 0; t < this.longest; t++) {
        const angle = Math.fround(t * frequency);
        this.cos[t * half + i] = Math.cos(angle);
        this.sin[t * half + i] = Math.sin(angle);
      }
    }
  }

  /** x (N, heads·d), turned in place by its positions: feature i of each head with i + d/2. `sign` −1 turns back. */
  rotate(x, heads, positions, sign = 1) {
    const { d, cos, sin } = this, half = d / 2;
    positions.forEach((position, t) => {
      for (let h = 0; h < heads; h++) {
        const at = (t * heads + h) * d;
        for (let i = 0; i < half; i++) {
          const left = x[at + i], right = x[at + half + i];
          const c = cos[position * half + i], s = sign * sin[position * half + i];
          x[at + i] = left * c - right * s;
          x[at + half + i] = right * c + left * s;
        }
      }
    });
  }

  /** RMSNorm: out (N, D) = x / √(mean(x²) + eps) · weight; what x was multiplied by is left in scales (N,). */
  rms_norm(out, x, weight, N, scales) {
    const { D, eps } = this;
    for (let t = 0; t < N; t++) {
      const scale = 1 / Math.sqrt(dot(x, t * D, x, t * D, D) / D + eps);
      scales[t] = scale;
      for (let i = 0; i < D; i++) out[t * D + i] = Math.fround(x[t * D + i] * scale) * weight[i];
    }
    return out;
  }

  // ── the three verbs of attention.py ──────────────────────────────────────────────────────────────────────────────

  /** Unrotated keys and values (N, G·d) of any vectors x (N, D) of the model's width: of tokens, or of prompts. */
  keys_values(layer, x, N) {
    const { memory, G, d } = this;
    const k = memory.multiply(memory.floats(N * G * d), x, layer.k_proj.forward, N);
    const v = memory.multiply(memory.floats(N * G * d), x, layer.v_proj.forward, N);
    return { k, v };
  }

  /** x (N, D) -> q (N, H·d), k and v (N, G·d); q and k are rotated. */
  project(layer, x, positions) {
    const { memory, H, G, d } = this, N = positions.length;
    const q = memory.multiply(memory.floats(N * H * d), x, layer.q_proj.forward, N);
    const { k, v } = this.keys_values(layer, x, N);
    this.rotate(q, H, positions);
    this.rotate(k, G, positions);
    return { q, k, v };
  }

  /** softmax(q kᵀ / √d) v of one row: q (T, H·d), k and v (S, G·d) -> y (T, H·d); returns the softmax, (H, T, S).
   *
   * Without openings it is attention among tokens: causal, y is overwritten. With openings (H,) it is the adapter's
   * term: every prompt is seen, and opening · term is added to y. An opening of 0 adds 0 · (something finite). */
  attend(y, q, k, v, T, S, openings = null) {
    const { memory, H, G, d } = this, weights = memory.floats(H * T * S), mean = new Float32Array(d);
    const root = 1 / Math.sqrt(d);
    for (let h = 0; h < H; h++) {
      const group = Math.floor((h * G) / H) * d; // H / G query heads share a key
      for (let t = 0; t < T; t++) {
        const seen = openings ? S : S - T + t + 1, row = (h * T + t) * S, at = (t * H + h) * d;
        let most = -Infinity, sum = 0;
        for (let s = 0; s < seen; s++) {
          const score = dot(q, at, k, s * G * d + group, d) * root;
          weights[row + s] = score;
          if (score > most) most = score;
        }
        for (let s = 0; s < seen; s++) sum += weights[row + s] = Math.exp(weights[row + s] - most);
        mean.fill(0);
        for (let s = 0; s < seen; s++) {
          weights[row + s] /= sum;
          addTo(mean, 0, weights[row + s], v, s * G * d + group, d);
        }
        weights.fill(0, row + seen, row + S);
        if (openings) addTo(y, at, openings[h], mean, 0, d);
        else y.set(mean, at);
      }
    }
    return weights;
  }

  /** y (N, H·d) -> out (N, D) += y Wᵀ: joins the heads and projects. */
  output(out, layer, y, N) {
    return this.memory.multiply(out, y, layer.o_proj.forward, N, true);
  }

  /** SwiGLU: out (N, D) += down(silu(gate(x)) · up(x)). Returns what the backward pass needs, (N, F) each. */
  mlp(out, layer, x, N) {
    const { memory, F } = this;
    const gate = memory.multiply(memory.floats(N * F), x, layer.gate_proj.forward, N);
    const up = memory.multiply(memory.floats(N * F), x, layer.up_proj.forward, N);
    const sigmoid = memory.floats(N * F), hidden = memory.floats(N * F);
    for (let i = 0; i < N * F; i++) {
      sigmoid[i] = 1 / (1 + Math.exp(-gate[i]));
      hidden[i] = gate[i] * sigmoid[i] * up[i];
    }
    memory.multiply(out, hidden, layer.down_proj.forward, N, true);
    return { gate, up, sigmoid };
  }

  // ── the adapter (adapters/llama_adapter.py) ──────────────────────────────────────────────────────────────────────

  /** An adapter {K, prompts: L of (K, D), gates: (L·H)} as `forward` takes it: the prompts' keys and values, and each
   *  gate's opening, tanh(gate · factor); factors (L·H) are the page's sliders. */
  open({ K, prompts, gates, tanh = true }, factors = null) {
    const prefixes = prompts.map((prompt, l) => this.keys_values(this.layers[l], this.memory.copy(prompt), K));
    const openings = gates.map((gate, i) => {
      const turned = gate * (factors ? factors[i] : 1);
      return tanh ? Math.tanh(turned) : turned;
    });
    return { K, prefixes, openings };
  }

  // ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────

  /** rows: arrays of ids.  adapter: from `open`, or null for the base.  cache: from `newCache`, for a single row.
   *  keep: leave in memory what the backward pass and the pictures read.
   *  Returns x (N, D), which the last norm has not seen yet, the rows' lengths and positions, and what was kept. */
  forward(rows, { adapter = null, cache = null, keep = false } = {}) {
    const { memory, D, H, G, d } = this, lengths = rows.map((row) => row.length), past = cache ? cache.length : 0;
    const positions = lengths.flatMap((T) => Array.from({ length: T }, (_, t) => past + t)), N = positions.length;
    if (Math.max(...positions) >= this.longest) throw new Error(`a text of over ${this.longest} bytes: shorten it`);
    let x = memory.floats(N * D);
    rows.flat().forEach((id, t) => x.set(this.embed_tokens.subarray(id * D, (id + 1) * D), t * D));
    const kept = this.layers.map((layer, l) => {
      const next = keep ? memory.floats(N * D) : x, used = memory.used;
      const scales1 = memory.floats(N), scales2 = memory.floats(N);
      const normed1 = this.rms_norm(memory.floats(N * D), x, layer.input_layernorm, N, scales1);
      const { q, k, v } = this.project(layer, normed1, positions);
      const y = memory.floats(N * H * d), onTokens = [], onPrompts = [];
      let start = 0;
      for (const T of lengths) {
        const cut = (array, width) => array.subarray(start * width, (start + T) * width);
        const mine = { q: cut(q, H * d), y: cut(y, H * d), k: cut(k, G * d), v: cut(v, G * d) };
        if (cache) {
          cache.k[l].set(mine.k, past * G * d);
          cache.v[l].set(mine.v, past * G * d);
          Object.assign(mine, { k: cache.k[l], v: cache.v[l] });
        }
        onTokens.push(this.attend(mine.y, mine.q, mine.k, mine.v, T, past + T));
        if (adapter) {
          const prefix = adapter.prefixes[l], openings = adapter.openings.subarray(l * H, (l + 1) * H);
          onPrompts.push(this.attend(mine.y, mine.q, prefix.k, prefix.v, T, adapter.K, openings));
        }
        start += T;
      }
      const middle = this.output(memory.copy(x), layer, y, N); // x + attention(norm(x))
      const normed2 = this.rms_norm(memory.floats(N * D), middle, layer.post_attention_layernorm, N, scales2);
      const before = x;
      next.set(middle);
      const mlp = this.mlp(next, layer, normed2, N); // middle + mlp(norm(middle))
      x = next;
      if (!keep) memory.used = used;
      return keep ? { x: before, scales1, q, k, v, onTokens, onPrompts, middle, scales2, ...mlp } : null;
    });
    if (cache) cache.length += N;
    return { x, N, lengths, positions, layers: kept };
  }

  /** Logits (N, V) of x (N, D): the last norm and the head. */
  logits(x, N) {
    const { memory, D, V } = this;
    const hidden = this.rms_norm(memory.floats(N * D), x, this.norm, N, memory.floats(N));
    return memory.multiply(memory.floats(N * V), hidden, this.lm_head.forward, N);
  }

  newCache(length) {
    const make = () => Array.from({ length: this.L }, () => new Float32Array(length * this.G * this.d));
    return { length: 0, k: make(), v: make() };
  }

  /** What the model writes behind ids, greedily, up to and with `stop`: {ids, logits: (V,) of each}. */
  generate(ids, { adapter = null, most = 16, stop = 10 } = {}) {
    const { memory, D, V } = this, cache = this.newCache(ids.length + most), written = [], logits = [];
    for (let next = ids; written.length < most && written.at(-1) !== stop; next = written.slice(-1)) {
      const last = memory.within(() => {
        const { x, N } = this.forward([next], { adapter, cache });
        return this.logits(x.subarray((N - 1) * D), 1).slice();
      });
      let best = 0;
      for (let i = 1; i < V; i++) if (last[i] > last[best]) best = i;
      written.push(best);
      logits.push(last);
    }
    return { ids: written, logits };
  }
}
