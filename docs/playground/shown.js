// What the page shows of its state: the answer, the gates, the attention; and what changes that state.
import { encode, truth } from "./dates.js";
import { drawAttention, letter } from "./draw.js";
import { $, adapters, allAt, answer, element, H, ids, kernel } from "./common.js";
import { L, model, READ, state, tellHeight, V, verdict } from "./common.js";

/** All that the page shows of its state. */
export function look({ text, adapter, factors, place }) {
  const started = performance.now();
  const used = adapters[adapter];
  const prompt = ids(text);
  const now = answer(text, used, factors);
  const base = answer(text, null);
  const whole = [...prompt, ...now.ids.slice(0, -1)];
  const T = whole.length;
  const at = prompt.length - 1 + Math.min(place, now.ids.length - 1); // where the chosen character is written
  const reference = model.memory.within(() => {
    const { x, N } = model.forward([whole]);
    return model.logits(x, N).slice();
  });
  return model.memory.within(() => {
    const opened = model.open(used, factors);
    const run = model.forward([whole], { adapter: opened, keep: true });
    const { K } = used;
    const logits = model.logits(run.x, T);
    const bits = (array) => new Uint32Array(array.buffer, array.byteOffset, array.length);
    const [mine, theirs] = [bits(logits), bits(reference)];
    let differ = 0;
    let furthest = 0;
    for (let i = 0; i < mine.length; i++) {
      differ += mine[i] !== theirs[i];
      furthest = Math.max(furthest, Math.abs(logits[i] - reference[i]));
    }
    const heads = [];
    for (let layer = 0; layer < L; layer++) {
      for (let head = 0; head < H; head++) {
        const { onTokens, onPrompts } = run.layers[layer];
        const row = head * T + at;
        heads.push({
          layer,
          head,
          opening: opened.openings[layer * H + head],
          prompts: onPrompts[0].slice(row * K, (row + 1) * K),
          tokens: onTokens[0].slice(row * T, row * T + at + 1),
        });
      }
    }
    const seen = whole.slice(0, at + 1);
    const milliseconds = performance.now() - started;
    return {
      text,
      now,
      base,
      differ,
      furthest,
      compared: mine.length,
      heads,
      seen,
      right: truth(text, READ),
      milliseconds,
    };
  });
}

// ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const probability = (logits, id) => 1 / logits.reduce((sum, logit) => sum + Math.exp(logit - logits[id]), 0);

/** The characters of an answer; those that can be chosen are buttons, among which the arrow keys move. */
export function boxes(host, { ids, logits }, right, chosen = null) {
  const wanted = right && encode(`${right}\n`);
  const focused = host.contains(document.activeElement);
  host.replaceChildren(
    ...ids.map((id, i) => {
      const share = probability(logits[i], id);
      const name = `${letter(id)}, ${(100 * share).toFixed(1)} %`;
      const box = element(chosen === null ? "span" : "button", {
        className: "box",
        textContent: letter(id),
        title: name,
      });
      if (wanted) box.classList.add(wanted[i] === id ? "right" : "wrong");
      box.style.setProperty("--p", share.toFixed(3));
      if (chosen === null) return box;
      box.ariaLabel = name;
      box.ariaPressed = i === chosen;
      box.tabIndex = i === chosen ? 0 : -1;
      const choose = (place) => {
        state.place = Math.max(0, Math.min(ids.length - 1, place));
        draw();
      };
      box.onclick = () => choose(i);
      box.onkeydown = ({ key }) => ({ ArrowRight: () => choose(i + 1), ArrowLeft: () => choose(i - 1) })[key]?.();
      return box;
    }),
  );
  if (focused) host.children[chosen]?.focus();
}

export function draw() {
  const seen = look(state);
  const place = Math.min(state.place, seen.now.ids.length - 1);
  boxes($("answer"), seen.now, seen.right, place);
  boxes($("base"), seen.base, seen.right);
  for (const [id, { ids }] of [
    ["answer-verdict", seen.now],
    ["base-verdict", seen.base],
  ]) {
    $(id).textContent = $(id).className = verdict(ids, seen.right);
  }
  const number = (value) => value.toLocaleString("en");
  const compared = number(seen.compared);
  const same = seen.differ === 0;
  $("identity").className = same ? "same" : "";
  $("identity").textContent = same
    ? `The base, bit for bit: of ${compared} logits (${seen.compared / V} places × ${V}), 0 differ in any bit.`
    : `${number(seen.differ)} of ${compared} logits differ from the base's, by up to ${seen.furthest.toPrecision(3)}.`;
  const milliseconds = seen.milliseconds.toFixed(0);
  $("speed").textContent = `All of this took ${milliseconds} ms, in ${kernel ? "WebAssembly" : "plain JavaScript"}.`;
  document.querySelectorAll("#gates .cell output").forEach((output, i) => {
    output.textContent = seen.heads[i].opening.toFixed(2);
  });
  drawAttention($("attention"), seen.heads, seen.seen);
  $("attention-caption").textContent =
    `Each row is a head, while the model writes “${letter(seen.now.ids[place])}”, ` +
    `character ${place + 1} of its answer. Left, what it takes from each prompt (orange adds, purple subtracts); ` +
    "right, where it looks in the text.";
  $("attention-words").textContent = inWords(seen);
  tellHeight();
}

function inWords({ heads, seen }) {
  const most = (list) => list.indexOf(Math.max(...list));
  const taking = heads.map(({ opening, prompts }) => Math.abs(opening) * Math.max(...prompts));
  const looking = heads.map(({ tokens }) => Math.max(...tokens));
  const taker = heads[most(taking)];
  const looker = heads[most(looking)];
  const at = most([...looker.tokens]);
  const amount = (taker.opening < 0 ? "−" : "") + Math.max(...taking).toFixed(2);
  const certain = (100 * Math.max(...looking)).toFixed(0);
  return (
    `Most is taken by head ${taker.head} of layer ${taker.layer}, ` +
    `${amount} from prompt ${most([...taker.prompts]) + 1}. ` +
    `The most certain look is that of head ${looker.head} of layer ${looker.layer}, ${certain} % ` +
    `at “${letter(seen[at])}”, character ${at + 1} of ${seen.length}.`
  );
}

let waiting = false;
/** Draws before the next frame, however much has changed by then. */
export function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}

// ── the date, the adapters, the gates ────────────────────────────────────────────────────────────────────────────────

export function setAdapter(name) {
  state.adapter = $("adapter").value = name;
  later();
}

export function setText(text) {
  state.text = $("date").value = text;
  later();
}

/** Turns every gate to the same factor, or each to its own, (L·H). */
export function setFactors(factors) {
  state.factors.set(typeof factors === "number" ? allAt(factors) : factors);
  document.querySelectorAll("#gates .cell input").forEach((slider, i) => (slider.value = state.factors[i]));
  document.querySelectorAll("#gates .layer input").forEach((slider, l) => (slider.value = state.factors[l * H]));
  if (typeof factors === "number") {
    $("all").value = factors;
    $("all-value").textContent = factors.toFixed(2);
  }
  later();
}

export function addAdapter(name, title, adapter) {
  adapters[name] = { ...adapter, title };
  $("adapter").replaceChildren(
    ...Object.entries(adapters).map(([value, { title }]) => element("option", { value, textContent: title })),
  );
}

export function gateSliders() {
  const slider = (label, oninput) => {
    const made = element("input", { type: "range", min: 0, max: 2, step: 0.05, value: 1, ariaLabel: label });
    made.oninput = () => oninput(+made.value);
    return made;
  };
  $("gates").style.setProperty("--heads", H);
  $("gates").append(
    element("span"),
    ...Array.from({ length: H }, (_, h) => element("span", { className: "head", textContent: `head ${h}` })),
  );
  for (let l = 0; l < L; l++) {
    const whole = slider(`all gates of layer ${l}`, (value) =>
      setFactors(state.factors.map((factor, i) => (Math.floor(i / H) === l ? value : factor))),
    );
    $("gates").append(element("span", { className: "layer head" }, `layer ${l}`, whole));
    for (let h = 0; h < H; h++) {
      const one = slider(`gate of layer ${l}, head ${h}`, (value) => {
        state.factors[l * H + h] = value;
        later();
      });
      $("gates").append(element("span", { className: "cell" }, one, element("output")));
    }
  }
}
