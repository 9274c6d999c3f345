// Heat maps of the chosen recipe: a row for each kind of linear, a column for each block.

const MAPS = {
  sparsity: { title: "Sparsity", ramp: "share", show: percent, log: false },
  bits: { title: "Bits per weight", ramp: "share", show: number, log: false },
  error: { title: "Error of the output", ramp: "error", show: number, log: true },
};
const { rows, columns, names, row: rowOf, column: columnOf } = data.grid;
// Which linear is in a cell.
const cellIndex = new Map(names.map((_, i) => [`${rowOf[i]} ${columnOf[i]}`, i]));
// More blocks than this leave no room for two maps side by side.
const NARROW = 40;

/** What a recipe changed: sparsity, or bits where nothing is pruned. */
const shareOf = (linears) => (linears.sparsity.some((value) => value > 0) ? "sparsity" : "bits");

const valueAt = (linears, key, i) => (linears[key][i] === null ? null : Number(linears[key][i]));

/** The range of a figure: of the chosen recipe, or of all that have a map of it, so that their colours compare. */
function rangeOf(key) {
  let [low, high] = [Infinity, -Infinity];
  for (const { linears } of byId("same-colours").checked ? data.entries : [data.entries[chosen.index]]) {
    if (!linears || (key !== "error" && shareOf(linears) !== key)) continue;
    for (const raw of linears[key]) {
      const value = Number(raw);
      if (raw === null || !Number.isFinite(value) || (MAPS[key].log && value <= 0)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  return low <= high ? { low, high } : { low: 1, high: 1 };
}

/** Where a value lies in a range, from 0 to 1. */
function share(value, { low, high }, log) {
  if (low === high) return value < low ? 0 : value > high ? 1 : 0.5;
  const forward = log ? Math.log : (v) => v;
  return Math.max(0, Math.min(1, (forward(Math.max(value, 0)) - forward(low)) / (forward(high) - forward(low))));
}

/** A mixture of the ramp's three colours, which follows the theme. */
function colour(ramp, t) {
  const [upper, lower, part] = t < 0.5 ? [1, 0, 200 * t] : [2, 1, 200 * t - 100];
  return `color-mix(in oklab, var(--${ramp}-${upper}) ${part.toFixed(1)}%, var(--${ramp}-${lower}))`;
}

function drawMaps() {
  const { linears, name } = data.entries[chosen.index];
  const place = byId("maps");
  const note = byId("maps-note");
  place.replaceChildren();
  place.classList.toggle("narrow", columns.length <= NARROW);
  if (!linears) {
    const unchanged = "The dense model is as it is: no linear was changed.";
    const why = chosen.index === 0 ? unchanged : `There are no figures of linears of ${name}.`;
    note.textContent = `${why} Choose another recipe.`;
    return;
  }
  const cursors = [];
  const maps = [shareOf(linears), "error"].map((key) => addFrame(place, key));
  for (const map of maps) addMap(map, linears, cursors);
  const errors = names.map((_, i) => valueAt(linears, "error", i) ?? -1);
  const worst = errors.indexOf(Math.max(...errors));
  note.textContent = `Largest error: ${number(errors[worst])} in ${names[worst]}.`;
}

/** The title and legend of a map. */
function addFrame(place, key) {
  const { title, ramp, show, log } = MAPS[key];
  const figure = add(place, "figure", { class: "map" });
  const caption = add(figure, "figcaption");
  add(caption, "h3", {}, title + (log ? ", log scale" : ""));
  const range = rangeOf(key);
  const legend = add(caption, "div", { class: `ramp ${ramp}` });
  add(legend, "span", {}, show(range.low, 3));
  const bar = add(legend, "i");
  if (range.low < range.high) add(legend, "span", {}, show(range.high, 3));
  else bar.style.background = colour(ramp, 0.5);
  return { key, range, figure, scroll: add(figure, "div", { class: "scroll-x" }) };
}

function addMap({ key, range, figure, scroll }, linears, cursors) {
  const { title, ramp, log } = MAPS[key];
  const svg = add(scroll, "svg", {});
  const labels = rows.map((label, i) => {
    const text = add(svg, "text", { "text-anchor": "end" }, label);
    const room = scroll.clientWidth * 0.4;
    for (let keep = label.length - 1; keep > 3 && text.getComputedTextLength() > room; keep--) {
      text.textContent = `…${label.slice(-keep)}`;
    }
    return text;
  });
  const gutter = Math.ceil(Math.max(...labels.map((text) => text.getComputedTextLength()))) + 8;
  const across = Math.max(6, Math.min(36, Math.floor((scroll.clientWidth - gutter - 4) / columns.length)));
  const down = Math.max(18, Math.min(24, across));
  const [width, height] = [gutter + across * columns.length + 4, down * rows.length + 20];
  // Its legend ends where the map ends.
  figure.style.maxWidth = `${Math.max(width, 360)}px`;
  const size = { width, height, viewBox: `0 0 ${width} ${height}` };
  for (const [name, value] of Object.entries(size)) svg.setAttribute(name, value);

  labels.forEach((text, i) => {
    text.setAttribute("x", gutter - 8);
    text.setAttribute("y", down * i + down / 2 + 4);
  });
  const every = [1, 2, 5, 10, 20, 50].find((step) => step * across >= 28) ?? 100;
  columns.forEach((label, i) => {
    const last = i === columns.length - 1;
    if (label === "–" ? !last : i % every) return;
    add(svg, "text", { x: gutter + across * (i + 0.5), y: height - 4, "text-anchor": "middle" }, label);
  });
  add(svg, "text", { x: gutter - 8, y: height - 4, "text-anchor": "end" }, "block");

  const gap = across >= 9 ? 1 : 0.5;
  const label = `${title}; arrow keys go from linear to linear`;
  const grid = add(svg, "g", { class: "grid", tabindex: 0, role: "group", "aria-label": label });
  const area = { x: gutter, y: 0, width: across * columns.length, height: down * rows.length };
  add(grid, "rect", { ...area, fill: "transparent" });
  names.forEach((_, i) => {
    const value = valueAt(linears, key, i);
    const cell = add(grid, "rect", {
      class: value === null ? "cell absent" : "cell",
      x: gutter + across * columnOf[i] + gap / 2,
      y: down * rowOf[i] + gap / 2,
      width: across - gap,
      height: down - gap,
    });
    if (value !== null) cell.style.fill = colour(ramp, share(value, range, log));
  });

  const cursor = add(svg, "rect", { class: "cursor", width: across, height: down, visibility: "hidden" });
  cursors.push((i) => {
    cursor.setAttribute("visibility", i === null ? "hidden" : "visible");
    if (i === null) return;
    cursor.setAttribute("x", gutter + across * columnOf[i]);
    cursor.setAttribute("y", down * rowOf[i]);
  });
  followCells(grid, cursor, linears, cursors, (event) => {
    const box = svg.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - gutter) / across);
    const row = Math.floor((event.clientY - box.top) / down);
    return cellIndex.get(`${row} ${column}`) ?? null;
  });
}

/** Tell the figures of the linear under the pointer, the finger or the arrow keys, and mark it in all maps. */
function followCells(grid, cursor, linears, cursors, cellUnder) {
  let at = null;
  const go = (i) => {
    at = i;
    for (const move of cursors) move(i);
    if (i === null) hideTip(grid);
    else showTip(grid, linesOf(linears, i), cursor.getBoundingClientRect());
  };
  grid.addEventListener("pointermove", (event) => go(cellUnder(event)));
  grid.addEventListener("pointerdown", (event) => go(cellUnder(event)));
  // A finger leaves as soon as it is lifted, and what it asked for is to stay.
  grid.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && go(null));
  // The finger scrolls instead.
  grid.addEventListener("pointercancel", () => go(null));
  const elsewhere = (event) => {
    if (!grid.isConnected) document.removeEventListener("pointerdown", elsewhere);
    else if (at !== null && !grid.contains(event.target)) go(null);
  };
  document.addEventListener("pointerdown", elsewhere);
  grid.addEventListener("focus", () => grid.matches(":focus-visible") && go(at ?? 0));
  grid.addEventListener("blur", () => go(null));
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || at === null) return;
    event.preventDefault();
    // Cells in between may be empty.
    let [row, column] = [rowOf[at] + step[0], columnOf[at] + step[1]];
    for (; row >= 0 && row < rows.length && column >= 0 && column < columns.length; row += step[0], column += step[1]) {
      const next = cellIndex.get(`${row} ${column}`);
      if (next !== undefined) return go(next);
    }
  });
}

function linesOf(linears, i) {
  if (linears.error[i] === null) return [names[i], "not compressed by this recipe"];
  const value = (key) => valueAt(linears, key, i);
  return [
    names[i],
    `error ${number(value("error"))}`,
    `sparsity ${percent(value("sparsity"))}, ${number(value("bits"))} bits per weight`,
    `${value("bytes").toLocaleString("en")} bytes`,
  ];
}
