// The plot of size and quality.

const axes = { size: data.sizes[0], quality: data.qualities[0], all: false };
// Values further apart than this are drawn on a log scale.
const WIDE = 4;

/** (value, low, high) of an entry on an axis, or null. */
function valuesOf(entry, axis) {
  const values = entry.at && entry.at[axis.key];
  return values && !Number.isNaN(Number(values[0])) ? values.map(Number) : null;
}

// --- scales

/**
 * From values to pixels between `start` and `end`, with a margin. What is beyond the range comes out beyond the pixels.
 * The scale is logarithmic where `mayLog` and the values are far apart; zeros are then beyond.
 */
function makeScale(values, start, end, mayLog) {
  const finite = values.filter(Number.isFinite);
  const positive = finite.filter((value) => value > 0);
  const log = mayLog && Math.max(...positive) >= WIDE * Math.min(...positive);
  const kept = log ? positive : finite.length ? finite : [1];
  const forward = log ? Math.log : (value) => value;
  const backward = log ? Math.exp : (value) => value;
  const [least, most] = [forward(Math.min(...kept)), forward(Math.max(...kept))];
  const margin = (most - least) * 0.08 || Math.abs(most) * 0.1 || 1;
  const [from, to] = [least - margin, most + margin];
  return {
    log,
    at: (value) => start + ((forward(value) - from) / (to - from)) * (end - start),
    low: backward(from),
    high: backward(to),
  };
}

function ticksOf(scale, most) {
  const { low, high, log } = scale;
  if (log) {
    for (const factors of [[1, 2, 5], [1]]) {
      const ticks = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
        ticks.push(...factors.map((factor) => factor * 10 ** power).filter((tick) => tick >= low && tick <= high));
      }
      if (ticks.length >= 3 && ticks.length <= most) return ticks;
      if (ticks.length > most && factors.length === 1) {
        const every = Math.ceil(ticks.length / most);
        return ticks.filter((_, i) => i % every === 0);
      }
    }
  }
  const raw = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(i * step + 0); // -0 + 0 is 0
  return ticks;
}

// --- labels

const LABEL_HEIGHT = 15;

const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
const within = (a, b) => a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom;

/** A box. */
const around = (x, y, radius) => ({ left: x - radius, right: x + radius, top: y - radius, bottom: y + radius });

/** Offsets to try for a label, as (to the right, down): first where the frontier does not pass. */
function offsets(up) {
  const side = up ? -1 : 1;
  const near = [[side * 9, -10], [side * -9, 12], [side * 13, 1], [side * -13, 1], [side * -9, -10], [side * 9, 12]];
  const far = [24, 38, 54].flatMap((down) =>
    [[side * 14, -down], [side * -14, down], [side * 14, down], [side * -14, -down]]);
  return [...near, ...far];
}

/** Points along a line, dense enough that no label passes between them. */
function along({ x1, y1, x2, y2 }) {
  const count = Math.ceil(Math.hypot(x2 - x1, y2 - y1) / 6);
  const at = (share) => around(x1 + (x2 - x1) * share, y1 + (y2 - y1) * share, 1);
  return Array.from({ length: count + 1 }, (_, i) => at(count ? i / count : 0));
}

/**
 * Write a label to each point that has room for it. Points come in the order in which they may choose.
 * A label covers no other label, point or bar, and a line only where there is no other place.
 */
function addLabels(parent, points, lines, frame, up) {
  const crossed = lines.flatMap(along);
  const taken = points.flatMap(({ index, x, y, low, high }) => [
    around(x, y, index === chosen.index ? 12 : 8),
    { left: x - 4, right: x + 4, top: Math.min(low, high), bottom: Math.max(low, high) },
  ]);
  const leaders = add(parent, "g");
  for (const point of points) {
    const label = add(parent, "text", { class: point.index === chosen.index ? "label chosen" : "label" }, point.label);
    const width = label.getComputedTextLength();
    const places = offsets(up)
      .map(([right, down]) => {
        const left = point.x + right - (right < 0 ? width : 0);
        const top = point.y + down - LABEL_HEIGHT / 2;
        const far = Math.abs(down) > 20;
        return { left, right: left + width, top, bottom: top + LABEL_HEIGHT, far, toLeft: right < 0 };
      })
      .filter((box) => within(box, frame) && !taken.some((other) => overlap(box, other)));
    const place = places.find((box) => !crossed.some((other) => overlap(box, other))) ?? places[0];
    if (!place) {
      label.remove();
      continue;
    }
    taken.push(place);
    label.setAttribute("x", place.left);
    label.setAttribute("y", place.bottom - 3.5);
    if (place.far) {
      const x2 = place.toLeft ? place.right - 4 : place.left + 4;
      const y2 = place.top > point.y ? place.top + 1 : place.bottom - 1;
      add(leaders, "line", { class: "leader", x1: point.x, y1: point.y, x2, y2 });
    }
  }
}

// --- drawing

function drawPlot() {
  const place = byId("plot");
  const focused = document.activeElement?.closest?.(".point")?.dataset.index;
  const width = place.clientWidth;
  const height = Math.round(Math.max(300, Math.min(540, width * 0.76)));
  const { size, quality } = axes;
  const limit = quality.key === "perplexity" && data.limit !== null && !axes.all ? data.limit : Infinity;

  const entries = data.entries
    .map((entry, index) => ({ entry, index, x: valuesOf(entry, size), y: valuesOf(entry, quality) }))
    .filter(({ x, y }) => x && y);

  if (place.contains(tipOwner)) hideTip(tipOwner);
  place.replaceChildren();
  const title = `${size.label} and ${quality.label}`;
  const svg = add(place, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": title });
  const [top, right, bottom] = [30, width - 6, height - 46];
  const near = entries.flatMap(({ y }) => (y[0] <= limit ? y.filter((value) => value <= limit) : []));
  const yScale = makeScale(near, bottom, top, !quality.up);
  const left = addQualityAxis(svg, yScale, right);
  const xScale = makeScale(entries.map(({ x }) => x[0]), left, right, true);
  addSizeAxis(svg, xScale, top, bottom);
  const frame = { left, right, top, bottom };

  const inFrame = (y) => Math.max(frame.top, Math.min(frame.bottom, y));
  const points = entries.map(({ entry, index, x, y }) => {
    const [exact, low, high] = y.map(yScale.at);
    const beyond = inFrame(exact) !== exact;
    return {
      entry,
      index,
      beyond,
      values: { x, y },
      x: xScale.at(x[0]),
      y: inFrame(exact),
      low: inFrame(low),
      high: inFrame(high),
      label: beyond ? `${entry.name} (${show[quality.key](y[0])} ${exact < frame.top ? "↑" : "↓"})` : entry.name,
    };
  });

  const dense = points.find(({ index }) => index === 0);
  const lines = add(svg, "g");
  if (dense && !dense.beyond) {
    add(lines, "line", { class: "reference", x1: frame.left, x2: frame.right, y1: dense.y, y2: dense.y });
  }
  const frontier = data.frontiers[size.key][quality.key];
  const corners = frontier.map((index) => points.find((point) => point.index === index));
  const parts = corners.slice(1).map((to, i) => ({ x1: corners[i].x, y1: corners[i].y, x2: to.x, y2: to.y }));
  parts.forEach((part, i) => {
    add(lines, "line", { class: corners[i].beyond || corners[i + 1].beyond ? "frontier beyond" : "frontier", ...part });
  });
  for (const { entry, x, low, high } of points) {
    if (Math.abs(low - high) < 2) continue;
    const d = `M${x - 4},${low}h8M${x - 4},${high}h8M${x},${low}V${high}`;
    add(lines, "path", { class: `whisker ${entry.family}`, d });
  }

  const layer = add(svg, "g");
  for (const point of [...points].sort((a, b) => a.x - b.x)) addPoint(layer, point);
  const rank = ({ index }) => (index === chosen.index ? 0 : index === 0 ? 1 : frontier.includes(index) ? 2 : 3);
  const room = { ...frame, top: frame.top - 8, right: width };
  addLabels(svg, [...points].sort((a, b) => rank(a) - rank(b)), parts, room, quality.up);
  if (focused !== undefined) layer.querySelector(`[data-index="${focused}"]`)?.focus();
  tellPlot(points, limit);
}

function titleOf(axis, scale) {
  const unit = axis.key === "bytes" ? `, ${data.unit.name}` : "";
  return `${upperFirst(axis.label)}${unit}${scale.log ? ", log scale" : ""}`;
}

/** The axis of quality at the left. Returns where the plot begins beside its numbers. */
function addQualityAxis(svg, scale, right) {
  const { quality } = axes;
  const grid = add(svg, "g", { class: "tick" });
  const ticks = ticksOf(scale, Math.abs(scale.at(scale.high) - scale.at(scale.low)) / 45)
    .filter((value) => quality.key !== "agreement" || value <= 1)
    .map((value) => {
      const text = add(grid, "text", { "text-anchor": "end" }, show[quality.key](value, 6));
      return { y: scale.at(value), text };
    });
  const left = Math.max(24, ...ticks.map(({ text }) => Math.ceil(text.getComputedTextLength()))) + 10;
  for (const { y, text } of ticks) {
    text.setAttribute("x", left - 8);
    text.setAttribute("y", y + 4);
    add(grid, "line", { x1: left, x2: right, y1: y, y2: y });
  }
  const better = quality.up ? "(↑ better)" : "(↓ better)";
  add(svg, "text", { class: "axis", x: 0, y: 12 }, `${titleOf(quality, scale)} ${better}`);
  return left;
}

function addSizeAxis(svg, scale, top, bottom) {
  const { size } = axes;
  const grid = add(svg, "g", { class: "tick" });
  for (const value of ticksOf(scale, (scale.at(scale.high) - scale.at(scale.low)) / 75)) {
    const x = scale.at(value);
    add(grid, "line", { x1: x, x2: x, y1: top, y2: bottom });
    // The unit is in the title.
    const text = number(size.key === "bytes" ? value / data.unit.bytes : value, 6);
    add(grid, "text", { x, y: bottom + 17, "text-anchor": "middle" }, text);
  }
  const end = { x: scale.at(scale.high), y: bottom + 38, "text-anchor": "end" };
  add(svg, "text", { class: "axis", ...end }, `${titleOf(size, scale)} (← smaller)`);
}

function addPoint(layer, { entry, index, x, y, values, beyond }) {
  const { size, quality } = axes;
  const [value, low, high] = values.y.map((each) => show[quality.key](each));
  const lines = [
    entry.name,
    `${upperFirst(size.label)}: ${show[size.key](values.x[0])}`,
    `${upperFirst(quality.label)}: ${value}${low === high ? "" : `, interval ${low} to ${high}`}`,
  ];
  const group = add(layer, "g", {
    class: beyond ? "point beyond" : "point",
    tabindex: 0,
    role: "button",
    "data-index": index,
    "aria-pressed": index === chosen.index,
    "aria-label": lines.join(". "),
  });
  add(group, "circle", { class: "hit", cx: x, cy: y, r: 13 });
  add(group, "circle", { class: "ring", cx: x, cy: y, r: 10.5 });
  addMark(group, entry.family, x, y);
  const tell = () => showTip(group, lines, group.querySelector(".ring").getBoundingClientRect());
  group.addEventListener("pointerenter", tell);
  group.addEventListener("pointerleave", () => hideTip(group));
  group.addEventListener("focus", () => group.matches(":focus-visible") && tell());
  group.addEventListener("blur", () => hideTip(group));
  group.addEventListener("click", () => choose(index));
  group.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose(index);
  });
}

/** Say below the plot what cannot be seen in it. */
function tellPlot(points, limit) {
  const note = byId("plot-note");
  const recipes = data.entries.slice(1);
  const plural = (count, text) => `${count} recipe${count === 1 ? "" : "s"} ${text}`;
  const failed = recipes.filter((entry) => !entry.at).length;
  const absent = recipes.length - failed - points.filter(({ index }) => index > 0).length;
  const beyond = points.filter((point) => point.beyond && point.values.y[0] > limit).length;
  const told = ["Bars are 95 % intervals.", "Choose a point to see its recipe."];
  if (axes.quality.key === "kl") told.push("The dense model's divergence is 0 by definition.");
  if (beyond) told.push(`${plural(beyond, `with a perplexity above ${number(limit)}`)} at the upper edge.`);
  if (absent) told.push(`${plural(absent, "without this figure")}.`);
  if (failed) told.push(`${plural(failed, "failed")}: see the table.`);
  note.textContent = told.join(" ");
  if (data.limit !== null && axes.quality.key === "perplexity") {
    note.append(" ");
    const text = axes.all ? "Zoom to the best" : "Show the whole range";
    const button = add(note, "button", { type: "button", class: "copy" }, text);
    button.addEventListener("click", () => {
      axes.all = !axes.all;
      drawPlot();
      note.querySelector("button").focus();
    });
  }
}

function addLegend() {
  const names = {
    dense: "dense model", prune: "pruned", quantize: "quantized", both: "pruned and quantized", factorize: "factorized",
  };
  const legend = byId("plot-legend");
  for (const [family, name] of Object.entries(names)) {
    if (!data.entries.some((entry) => entry.at && entry.family === family)) continue;
    const item = add(legend, "span");
    addMark(add(item, "svg", { class: `mark ${family}`, "aria-hidden": "true" }), family);
    item.append(name);
  }
  for (const [style, name] of [["frontier", "frontier"], ["reference", "dense model's quality"]]) {
    const item = add(legend, "span");
    const svg = add(item, "svg", { class: "stroke", viewBox: "0 0 24 16", "aria-hidden": "true" });
    add(svg, "line", { class: style, x1: 0, x2: 24, y1: 8, y2: 8 });
    item.append(name);
  }
}

/** Buttons of which one is pressed, for what an axis shows. */
function addChoice(fieldset, name, options) {
  const segments = add(fieldset, "div", { class: "segments" });
  for (const option of options) {
    const label = add(segments, "label");
    const input = add(label, "input", { type: "radio", name, value: option.key });
    input.checked = axes[name] === option;
    input.addEventListener("change", () => {
      axes[name] = option;
      drawPlot();
    });
    label.append({ bytes: "on disk", kl: "KL divergence", agreement: "same token" }[option.key] ?? option.label);
  }
}
