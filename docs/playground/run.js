// A training run: workers compute gradients, this thread sums them and makes the step.
import { AdamW, newAdapter } from "./train.js";

/** Workers that each hold a model; `ask` sends a task to all and waits for all their answers. */
export class Pool {
  static async open(script, count, { config, weights, kernel }) {
    const url = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
    const pool = new Pool();
    pool.workers = Array.from({ length: count }, () => new Worker(url));
    pool.waiting = new Map();
    pool.next = 0;
    for (const worker of pool.workers) {
      worker.onmessage = ({ data: { id, error, ...answer } }) => {
        const { resolve, reject } = pool.waiting.get(id);
        pool.waiting.delete(id);
        if (error) reject(new Error(error));
        else resolve(answer);
      };
    }
    await pool.ask({ task: "open", config, weights, kernel });
    return pool;
  }

  /** One answer of each worker, in their order. */
  ask(message) {
    return Promise.all(
      this.workers.map((worker, i) => this.send(worker, { ...message, worker: i, workers: this.workers.length })),
    );
  }

  one(message) {
    return this.send(this.workers[0], message);
  }

  send(worker, message) {
    const id = this.next++;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      worker.postMessage({ ...message, id });
    });
  }
}

const total = (parts, name) => parts.reduce((sum, part) => sum + part[name], 0);

/** An adapter in training. */
export class Run {
  constructor(model, pool, { language, steps, batch = 16, peak = 0.1, seed = 0, gate = 0, K = 10 }) {
    Object.assign(this, { model, pool, language, steps, batch, seed, gate, K, history: [] });
    this.adapter = newAdapter(model, { K, seed: seed + 1, gate });
    this.optimizer = new AdamW(this.adapter.flat.length, { steps, peak });
  }

  get flat() {
    return this.adapter.flat;
  }

  /** One step of AdamW; its record joins the history. */
  async step() {
    const { language, seed, batch, K, flat } = this;
    const step = this.history.length;
    const parts = await this.pool.ask({ task: "step", flat, K, language, seed, step, batch });
    const count = total(parts, "count");
    const gradient = new Float64Array(flat.length);
    for (const part of parts) for (let i = 0; i < gradient.length; i++) gradient[i] += part.gradient[i] / count;
    const norm = this.optimizer.update(flat, gradient);
    const { gates } = this.adapter;
    this.history.push({
      loss: total(parts, "loss") / count,
      right: total(parts, "right") / batch,
      norm,
      openings: Array.from(gates, Math.tanh),
    });
    return this.history.at(-1);
  }

  /** The share of `dates` unseen dates that are answered to the letter; `base`: without the adapter. */
  async test(dates, base = false) {
    const { language, K, flat } = this;
    return total(await this.pool.ask({ task: "test", flat, K, language, dates, base }), "right") / dates;
  }

  /** What the model answers to texts now, as ids. */
  async answers(texts) {
    return (await this.pool.one({ task: "answer", flat: this.flat, K: this.K, texts })).written;
  }
}
