// The story that the page tells, and the training that it ends in.
import { decode, FORMATS, iso, languageName, truth, written } from "./dates.js";
import { drawCurves } from "./draw.js";
import { Pool, Run } from "./run.js";
import { $, adapters, allAt, answer, ASSETS, calm, element, H, kernel, L, model } from "./common.js";
import { options, READ, tellHeight, verdict, weights } from "./common.js";
import { addAdapter, setAdapter, setFactors, setText } from "./shown.js";

// ── the story ────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Each step: a sentence, the answer that this tab computes for it now, and a button that sets the page so. */
export function tour({ telling, layer }) {
  const french = adapters.fr;
  const closed = allAt(1).map((factor, i) => (Math.floor(i / H) === layer.layer ? 0 : factor));
  const steps = [
    {
      say: "The base knows English, and nothing changes it from here on: its 791,680 weights are frozen.",
      text: "March 3, 2021",
      factors: allAt(0),
    },
    {
      say: "French was never taught. Some dates it guesses by their first letters; this one it gets wrong.",
      text: telling.fr,
      factors: allAt(0),
    },
    {
      say:
        "Beside each layer stand ten learned prompts, and each head has a gate: 5,136 numbers, 0.65 % of the base. " +
        "With the gates as they were trained it reads French.",
      text: telling.fr,
      factors: allAt(1),
    },
    {
      say: "More is not better: opened twice as far, the same gates spoil the answer.",
      text: telling.fr,
      factors: allAt(2),
    },
    {
      say: `The layers share the work. With the gates of layer ${layer.layer} alone at 0, this date goes wrong.`,
      text: layer.text,
      factors: closed,
    },
  ];
  const items = steps.map(({ say, text, factors }) => {
    const { ids } = answer(text, french, factors);
    const mark = verdict(ids, truth(text, READ));
    const shown = element(
      "code",
      {},
      `${text} = `,
      element("b", { className: mark, textContent: decode(ids).trim() }),
    );
    const button = element("button", { textContent: "set the page so" });
    button.ariaLabel = `set the page so: ${text}`;
    button.onclick = () => {
      setAdapter("fr");
      setText(text);
      const even = factors.every((factor) => factor === factors[0]);
      setFactors(even ? factors[0] : factors);
      $("ask-title").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
    };
    return element(
      "li",
      {},
      say,
      element("div", { className: "shown" }, shown, element("span", { className: mark, textContent: mark }), button),
    );
  });
  const train = element("button", { textContent: "train French here" });
  train.onclick = () => {
    $("language").value = "fr";
    $("start").value = "0";
    $("train-title").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
    $("train").click();
  };
  const say =
    "None of this is a film. In 150 steps a new adapter learns French in this tab: its gates begin at 0, so that the " +
    "first step starts from the base and moves only the gates. You can race it against gates begun at 1. On this " +
    "small base both arrive, at 98 % after 100 steps (three seeds each); a real LLaMA in lesson 08 reaches 99 % from " +
    "0 and at most 31 % from 1.";
  const lastStep = element("li", {}, say, element("div", { className: "shown" }, train));
  $("tour").replaceChildren(...items, lastStep);
}

// ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────

let pool = null; // a promise of one, once it was asked for
let runs = [];
let stopped = false;

export const drawRuns = () => drawCurves($("curves"), runs);

function openPool() {
  const spare = Math.max(1, Math.min(4, navigator.hardwareConcurrency ?? 2));
  pool ??= Pool.open(ASSETS.worker, +(options.get("workers") ?? spare), { config: ASSETS.config, weights, kernel });
  return pool;
}

/** Trains one run, or two side by side, tests before and after, and keeps the adapters. */
export async function train({ language, steps, starts, dates = 200, seed = 0 }) {
  const name = languageName(language);
  const days = [30_000, 44_259, 61_234];
  const texts = days.map((day, i) => written(day, FORMATS[2 - i], language));
  if (!READ.includes(language)) READ.push(language);
  stopped = false;
  $("result").textContent = "";
  $("progress").textContent = "opening the workers …";
  const open = await openPool();
  runs = starts.map((gate) =>
    Object.assign(new Run(model, open, { language, steps, seed, gate }), { name: `gates from ${gate}` }),
  );
  $("progress").textContent = "testing the base …";
  const before = await runs[0].test(dates, true);
  const started = performance.now();
  drawRuns();
  for (let step = 0; step < steps && !stopped; step++) {
    for (const run of runs) await run.step();
    const seconds = (performance.now() - started) / 1000;
    const now = runs.map((run) => run.history[step].loss.toFixed(3)).join(" and ");
    $("progress").textContent =
      `step ${step + 1} of ${steps} · loss ${now} · ${seconds.toFixed(0)} s · ${open.workers.length} workers`;
    const tenth = step % 10 === 9 || step === steps - 1;
    if (tenth) {
      const answers = await runs[0].answers(texts);
      $("samples").replaceChildren(
        ...texts.map((text, i) => {
          const written = { className: verdict(answers[i], iso(days[i])), textContent: decode(answers[i]).trim() };
          return element("p", {}, `${text} = `, element("b", written));
        }),
      );
    }
    if (tenth || (!calm && step % 3 === 2)) {
      drawRuns();
      tellHeight();
      await new Promise((resolve) => setTimeout(resolve)); // lets the page live
    }
  }
  const seconds = (performance.now() - started) / 1000;
  const after = [];
  for (const run of runs) after.push(await run.test(dates));
  runs.forEach((run, i) => {
    const from = starts[i] ? `, gates from ${starts[i]}` : "";
    addAdapter(`${language}-${starts[i]}`, `${name}, learned here${from}`, run.adapter);
  });
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const taken = runs[0].history.length;
  const learned = runs.map((run, i) => `${percent(after[i])} with ${run.name}`).join(" and ");
  $("result").textContent =
    `${name}, ${dates} dates never trained on: ${percent(before)} before; after ${taken} steps of 16 in ` +
    `${seconds.toFixed(0)} s, ${learned}. The base's weights were not touched.`;
  setText(texts[1]);
  setFactors(1);
  setAdapter(`${language}-${starts[0]}`);
  return { before, after, seconds, losses: runs.map((run) => run.history.map(({ loss }) => loss)) };
}

/** What a click on the button does: it starts, or ends early what runs. */
export async function trainOrStop() {
  if ($("train").textContent === "stop") {
    stopped = true;
    return;
  }
  const language = $("language").value === "other" ? $("tag").value.trim() : $("language").value;
  const starts = { 0: [0], 1: [1], race: [0, 1] }[$("start").value];
  $("train").textContent = "stop";
  try {
    await train({ language, steps: Math.max(1, Math.min(2000, Math.round(+$("steps").value || 150))), starts });
  } catch (error) {
    $("progress").textContent = "";
    $("result").textContent = error.message;
  } finally {
    $("train").textContent = "train";
    tellHeight();
  }
}
