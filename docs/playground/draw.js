// The two pictures, on canvases: where the heads look, and the curves of training.

export const letter = (id) => ({ 10: "⏎", 32: "␣" })[id] ?? (id > 32 && id < 127 ? String.fromCharCode(id) : "·");

/** A canvas's context, sized to its place and sharp on any screen; `color` reads the page's colours. */
function begin(canvas, height) {
  const ratio = devicePixelRatio || 1,
    width = canvas.clientWidth,
    style = getComputedStyle(document.documentElement);
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.textBaseline = "middle";
  return { context, width, color: (name) => style.getPropertyValue(`--${name}`).trim() };
}

/** rows: {layer, head, opening, prompts (K), tokens (T)} of each head; ids (T): the text that they look at. */
export function drawAttention(canvas, rows, ids) {
  const K = rows[0].prompts.length,
    T = ids.length,
    high = 15,
    top = 36,
    apart = 5,
    left = 62,
    gap = 14;
  const { context, width, color } = begin(canvas, top + rows.length * high + (rows.at(-1).layer + 1) * apart);
  const cell = Math.min(22, (width - left - gap - 2) / (K + T)),
    second = left + K * cell + gap,
    ink = color("ink");
  const square = (x, y, name, value) => {
    context.globalAlpha = Math.min(1, Math.sqrt(value)); // the root shows what is small
    context.fillStyle = color(name);
    context.fillRect(x, y, Math.max(1, cell - 1), high - 1);
    context.globalAlpha = 1;
  };
  context.fillStyle = ink;
  context.font = "12px system-ui, sans-serif";
  context.fillText(cell > 9 ? "prompts × opening" : "prompts", left, 9);
  context.fillText("text", second, 9);
  context.textAlign = "center";
  context.font = `${Math.max(7, Math.min(12, cell * 1.2))}px ui-monospace, monospace`;
  for (let i = 0; i < K; i++) if (cell > 9 || i % 3 === 0) context.fillText(i + 1, left + (i + 0.5) * cell, top - 9);
  ids.forEach((id, i) => context.fillText(letter(id), second + (i + 0.5) * cell, top - 9));
  context.textAlign = "left";
  context.font = "11px system-ui, sans-serif";
  rows.forEach(({ layer, head, opening, prompts, tokens }, r) => {
    const y = top + r * high + layer * apart;
    context.fillStyle = ink;
    if (head === 0) context.fillText(`layer ${layer}`, 0, y + high / 2);
    context.fillText(head, 48, y + high / 2);
    prompts.forEach((share, i) =>
      square(left + i * cell, y, opening < 0 ? "minus" : "trained", Math.abs(opening) * share),
    );
    tokens.forEach((share, i) => square(second + i * cell, y, "frozen", share));
  });
}

/** runs: {name, history, steps} of one run or of two in a race; the loss of each, and the gates of the first. */
export function drawCurves(canvas, runs) {
  const narrow = canvas.clientWidth < 560,
    high = 190,
    { context, width, color } = begin(canvas, narrow ? 2 * high : high);
  const panel = narrow ? width : width / 2 - 10,
    steps = Math.max(2, ...runs.map((run) => run.steps));
  const place = (x0, y0, lowest, highest) => ({
    x: (step) => x0 + 34 + ((panel - 44) * step) / (steps - 1),
    y: (value) =>
      y0 + 26 + (high - 44) * (1 - (Math.min(highest, Math.max(lowest, value)) - lowest) / (highest - lowest)),
    x0,
    y0,
  });
  const line = ({ x, y }, values, stroke, dash = [], thick = 1.5) => {
    context.beginPath();
    values.forEach((value, step) => context.lineTo(x(step), y(value)));
    context.strokeStyle = color(stroke);
    context.setLineDash(dash);
    context.lineWidth = thick;
    context.stroke();
    context.setLineDash([]);
  };
  const axis = (at, title, ticks) => {
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = color("ink");
    context.fillText(title, at.x0 + 34, at.y0 + 9);
    for (const [value, label] of ticks) {
      line(at, [value, ...Array(steps - 2).fill(value), value], "line", [], 1);
      context.fillStyle = color("dim");
      context.fillText(label, at.x0, at.y(value));
    }
  };
  const losses = place(0, 0, -3, Math.log10(30)),
    gates = narrow ? place(0, high, -1, 1) : place(width - panel, 0, -1, 1);
  axis(losses, "loss, nats a character", [
    [1, "10"],
    [0, "1"],
    [-1, "0.1"],
    [-2, "0.01"],
  ]);
  axis(gates, runs.length > 1 ? "gates opening, of the run begun at 0" : "gates opening", [
    [1, "1"],
    [0, "0"],
    [-1, "−1"],
  ]);
  runs.forEach(({ history, name }, i) => {
    if (history.length < 2) return;
    line(
      losses,
      history.map((h) => Math.log10(h.loss)),
      i ? "frozen" : "trained",
      i ? [5, 3] : [],
      2,
    );
    context.fillStyle = color(i ? "frozen" : "trained");
    if (runs.length > 1) context.fillText(`${i ? "┄" : "━"} ${name}`, panel - 120, 26 + 16 * i);
  });
  const first = runs[0]?.history ?? [];
  if (first.length > 1)
    first[0].openings.forEach((_, g) =>
      line(
        gates,
        first.map((h) => h.openings[g]),
        "gate",
        [],
        1,
      ),
    );
}
