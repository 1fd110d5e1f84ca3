// One of several workers. It holds a model of its own, makes its share of each batch and sends the gradient back.
import { Memory } from "./matrix.js";
import { LLaMA } from "./llama.js";
import { adapterOf, lossAndGradient, seeded } from "./train.js";
import { encode, example } from "./dates.js";
import { readSafetensors } from "./safetensors.js";

let model;
const answers = {
  open({ config, weights, kernel }) {
    model = new LLaMA(config, readSafetensors(weights).tensors, new Memory(64, kernel), { trainable: true });
    return {};
  },

  /** Loss and gradient over this worker's share of a batch, which must not be empty; every example has a seed of its
   *  own, so that the batches are the same however many workers there are. */
  step({ adapter, language, seed, step, batch, worker, workers }) {
    const share = [];
    for (let i = worker; i < batch; i += workers) {
      share.push(example(language, seeded(seed * 1_000_003 + step * 1009 + i)));
    }
    return lossAndGradient(model, adapter, share);
  },

  /** How many of this worker's share of unseen dates are answered to the letter. */
  test({ adapter, language, dates, worker, workers, base }) {
    return model.memory.within(() => {
      const opened = base ? null : model.open(adapter);
      let right = 0;
      for (let i = worker; i < dates; i += workers) {
        const { prompt, answer } = example(language, seeded(7 + i), true);
        right += model.generate(prompt, { adapter: opened }).ids.join() === answer.join();
      }
      return { right };
    });
  },

  /** What the model answers to texts. */
  answer({ adapter, texts }) {
    return model.memory.within(() => {
      const opened = model.open(adapter);
      return { written: texts.map((text) => model.generate(encode(`${text} = `), { adapter: opened }).ids) };
    });
  },
};

onmessage = ({ data: { id, task, ...message } }) => {
  try {
    if (message.flat) message.adapter = adapterOf(model, message.K, message.flat);
    postMessage({ id, ...answers[task](message) });
  } catch (error) {
    postMessage({ id, error: error.message });
  }
};
