// The page as a whole: theme, choosing, copying, sorting; then everything is drawn for the first time.

// --- theme

/** What the system asks for, until the reader says otherwise. A page from disk may not be allowed to remember it. */
function setUpTheme() {
  const button = byId("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let wanted = null;
  try {
    wanted = localStorage.getItem("secateur-theme");
  } catch {}
  const isDark = () => (wanted === null ? dark.matches : wanted === "dark");
  const apply = () => {
    if (wanted !== null) document.documentElement.dataset.theme = isDark() ? "dark" : "light";
    button.textContent = isDark() ? "Light colours" : "Dark colours";
  };
  button.addEventListener("click", () => {
    wanted = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("secateur-theme", wanted);
    } catch {}
    apply();
  });
  dark.addEventListener("change", apply);
  button.hidden = false;
  apply();
}

// --- copying

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Some browsers give a page from disk no clipboard: the old way, through a selection.
    const area = add(document.body, "textarea", { readonly: "", "aria-hidden": "true" });
    area.value = text;
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

function setUpCopying() {
  for (const figure of document.querySelectorAll(".code")) {
    const caption = figure.querySelector("figcaption");
    const title = caption.textContent.toLowerCase();
    const button = add(caption, "button", { type: "button", class: "copy", "aria-live": "polite" });
    const say = (word) => {
      button.textContent = word;
      button.setAttribute("aria-label", `${word} the ${title}`);
    };
    say("Copy");
    button.addEventListener("click", async () => {
      const copied = await copyText(figure.querySelector("pre").textContent);
      button.focus();
      say(copied ? "Copied" : "Could not copy");
      setTimeout(say, 1500, "Copy");
    });
  }
}

// --- the table

function setUpSorting() {
  const body = document.querySelector("tbody");
  const original = [...body.rows];
  const headings = [...document.querySelectorAll("thead th")];
  const next = { none: "ascending", ascending: "descending", descending: "none" };

  headings.forEach((heading, column) => {
    const text = heading.textContent;
    heading.replaceChildren();
    heading.setAttribute("aria-sort", "none");
    add(heading, "button", { type: "button" }, text).addEventListener("click", () => {
      const order = next[heading.getAttribute("aria-sort")];
      for (const other of headings) other.setAttribute("aria-sort", other === heading ? order : "none");
      body.append(...(order === "none" ? original : sorted(original, column, order)));
    });
  });
}

/** Rows in the order of a column. Those that have nothing there come last either way. */
function sorted(rows, column, order) {
  const key = (row) => row.cells[column]?.dataset.v;
  const byName = (a, b) => a.localeCompare(b, "en", { numeric: true });
  const byNumber = (a, b) => (a === b ? 0 : Number(a) - Number(b)); // infinity minus itself is no number
  const compare = column === 0 ? byName : byNumber;
  const full = rows.filter((row) => key(row) !== undefined);
  const empty = rows.filter((row) => key(row) === undefined);
  const sign = order === "ascending" ? 1 : -1;
  return [...full.sort((a, b) => sign * compare(key(a), key(b))), ...empty];
}

// --- choosing

function setUpChoosing() {
  const select = byId("recipe-choice");
  data.entries.forEach((entry, i) => add(select, "option", { value: i }, entry.name));
  select.addEventListener("change", () => choose(Number(select.value)));
  document.querySelectorAll("tbody tr").forEach((row, i) => {
    row.querySelector("a").addEventListener("click", (event) => {
      event.preventDefault();
      choose(i);
      byId("frontier").scrollIntoView();
    });
  });
  const marked = data.entries.map((_, i) => [byId(`entry-${i}`), byId(`row-${i}`)]);
  onChoice((index) => {
    marked.forEach((elements, i) => elements.forEach((element) => element.classList.toggle("chosen", i === index)));
    select.value = index;
  });
}

/** To begin with: of the frontier's recipes the one that keeps most quality, or else the first. */
function firstChoice() {
  const recipes = data.frontiers[data.sizes[0].key][data.qualities[0].key].filter((index) => index > 0);
  return recipes.at(-1) ?? Math.min(1, data.entries.length - 1);
}

document.documentElement.classList.add("js");
setUpTheme();
setUpCopying();
setUpSorting();
setUpChoosing();
addLegend();
addChoice(byId("size-choice"), "size", data.sizes);
addChoice(byId("quality-choice"), "quality", data.qualities);
byId("same-colours").addEventListener("change", drawMaps);
onChoice(drawPlot);
if (names.length) onChoice(drawMaps);
else byId("linears").remove();
choose(firstChoice());

let drawnWidth = document.documentElement.clientWidth;
addEventListener("resize", () => {
  // A phone also resizes when its bars come and go.
  if (document.documentElement.clientWidth === drawnWidth) return;
  drawnWidth = document.documentElement.clientWidth;
  choose(chosen.index);
});
