// The two pictures, on canvases: where the heads look, and the curves of training.

export const letter = (id) => ({ 10: "⏎", 32: "␣" })[id] ?? (id > 32 && id < 127 ? String.fromCharCode(id) : "·");

/** A canvas's context, sized to its place and sharp on any screen; `color` reads the page's colours. */
function begin(canvas, height) {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth, style = getComputedStyle(document.documentElement);
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
  const K = rows[0].prompts.length, T = ids.length, high = 15, top = 36, apart = 5, left = 62, gap = 14;
  const { context, width, color } = begin(canvas, top + rows.length * high + (rows.at(-1).layer + 1) * apart);
  const cell = Math.min(22, (width - left - gap - 2) / (K + T)), second = left + K * cell + gap, ink = color("ink");
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
  canvas.hidden = !runs.length;
  if (canvas.hidden) return;
  const narrow = canvas.clientWidth < 560, high = 190;
  const { context, width, color } = begin(canvas, narrow ? 2 * high : high);
  const panel = narrow ? width : width / 2 - 10, steps = Math.max(2, ...runs.map((run) => run.steps));

  /** A panel whose corner is (x0, y0) and whose values go from lowest to highest. */
  const axes = (x0, y0, lowest, highest, title, ticks) => {
    const x = (step) => x0 + 34 + ((panel - 44) * step) / (steps - 1);
    const y = (value) => y0 + 28 + (high - 46) * (1 - (value - lowest) / (highest - lowest));
    const line = (values, stroke, { thick = 1, faint = 1, dash = [] } = {}) => {
      context.beginPath();
      values.forEach((value, step) => context.lineTo(x(step), y(Math.min(highest, Math.max(lowest, value)))));
      Object.assign(context, { strokeStyle: color(stroke), lineWidth: thick, globalAlpha: faint });
      context.setLineDash(dash);
      context.stroke();
      context.setLineDash([]);
      context.globalAlpha = 1;
    };
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = color("ink");
    context.fillText(title, x0 + 34, y0 + 9);
    for (const [value, label] of ticks) {
      line(Array(steps).fill(value), "line");
      context.fillStyle = color("dim");
      context.fillText(label, x0, y(value));
    }
    return line;
  };

  const ticks = [[0, "1"], [-1, "0.1"], [-2, "0.01"], [-3, "0.001"]];
  const loss = axes(0, 0, -3, 0.3, "loss, nats a character; bold: mean of ten steps", ticks);
  runs.forEach(({ history, name }, i) => {
    const losses = history.map((record) => record.loss), stroke = i ? "frozen" : "trained", dash = i ? [5, 3] : [];
    const means = losses.map((_, step) => {
      const some = losses.slice(Math.max(0, step - 9), step + 1);
      return some.reduce((sum, value) => sum + value) / some.length;
    });
    loss(losses.map(Math.log10), stroke, { faint: 0.4, dash });
    loss(means.map(Math.log10), stroke, { thick: 2.5, dash });
    context.fillStyle = color(stroke);
    if (runs.length > 1) context.fillText(`${i ? "┅" : "━"} ${name}`, panel - 118, 40 + 17 * i);
  });
  const [x0, y0] = narrow ? [0, high] : [width - panel, 0], { history, name } = runs[0];
  const title = runs.length > 1 ? `how far they stand open, ${name}` : "how far the 16 gates stand open";
  const gates = axes(x0, y0, -1, 1, title, [[1, "1"], [0, "0"], [-1, "−1"]]);
  history[0]?.openings.forEach((_, g) => gates(history.map(({ openings }) => openings[g]), "gate"));
}
