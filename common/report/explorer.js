// A text as a model reads it, word by word, for the report's gate explorer and the server's page.
// Their own code follows in the same script. Data only ever becomes text nodes.
const $ = (id) => document.getElementById(id);
const element = (tag, textContent = "", properties = {}) =>
  Object.assign(document.createElement(tag), { textContent, ...properties });
const number = (value) => (value == null ? "not a number" : value.toFixed(3));
const percent = (value) => `${(100 * value).toFixed(1)} %`;

// ast: Vega interprets its expressions, so the page's security policy can forbid eval.
async function draw(place, charts) {
  const options = { ast: true, renderer: "svg", actions: false };
  place.view = (await vegaEmbed(place, charts[place.dataset.chart], options)).view;
}

function theme() {
  const select = $("theme");
  const apply = () => { document.documentElement.style.colorScheme = select.value; };
  // Some browsers have no storage for pages from files.
  try { select.value = localStorage.getItem("theme") ?? ""; } catch { /* no storage */ }
  if (select.selectedIndex < 0) select.value = "";
  apply();
  select.onchange = () => {
    apply();
    try { localStorage.setItem("theme", select.value); } catch { /* no storage */ }
  };
}

const CHOICES = `
<label>Tint <select id="tint"><option value="z">update gate z: share of the candidate</option><option value="change">change of the state</option><option value="gradient">influence: gradient × input</option><option value="leave_out">influence: left out</option></select></label>
<label id="directions">Direction <select id="direction"><option value="forward">forward</option><option value="backward">backward</option></select></label>`;

const MEANINGS = {
  z: "Mean of the update gate z over the hidden units: 0 keeps the state, 1 replaces it by the candidate.",
  change: "Norm of the change of the state that the word causes.",
  gradient: "Gradient × input of the predicted class's logit. Blue speaks for the prediction, orange against it.",
  leave_out: "How far the predicted class's logit falls when the word is left out. Blue speaks for the prediction, orange against it.",
};

// Adds the choices for all panels to the page's controls.
function choices(onchange) {
  const place = document.querySelector(".controls"), meaning = element("p", "", { className: "note" });
  place.insertAdjacentHTML("beforeend", CHOICES);
  place.after(meaning);
  const show = () => {
    meaning.textContent = MEANINGS[$("tint").value];
    onchange();
  };
  $("tint").onchange = $("direction").onchange = show;
  show();
}

// The values per word; a bidirectional model has values for each direction.
const directed = (values) =>
  (!values || Array.isArray(values) ? values : values[$("direction").value]);

const PANEL = `
<p class="verdict"></p>
<div class="legend" aria-hidden="true"><span class="low"></span><span class="scale"></span><span class="high"></span></div>
<div class="words" role="listbox" tabindex="0" aria-label="words of the text" dir="auto"></div>
<dl class="word facts"></dl>
<figure>
<figcaption></figcaption>
<div class="chart" data-chart="running"></div>
</figure>`;

let panels = 0;

// Adds a view of a text and a model's values to the place. onselect receives the selected index.
function panel(place, onselect = () => {}) {
  place.insertAdjacentHTML("beforeend", PANEL);
  const part = (name) => place.querySelector(name);
  const [legend, words, facts, chart] = [".legend", ".words", ".word", ".chart"].map(part);
  const id = `panel-${++panels}`;
  let current, active, read = [];

  // places: the indices of the words that the model reads. Others are grey and not selectable.
  function show(explained, texts, places, classes, index = 0) {
    current = explained;
    active = undefined;
    const shown = classes.length === 2 ? classes[1] : explained.predicted;
    part("figcaption").textContent = `The probability of ${shown} after each word`;
    part("figure").hidden = !explained.running;
    words.replaceChildren(...texts.map((word, i) =>
      element("span", word, { id: `${id}-${i}`, role: "option", ariaDisabled: "true" })));
    words.removeAttribute("aria-activedescendant");
    read = [...places].map((i) =>
      Object.assign(words.children[i], { ariaDisabled: null, ariaSelected: "false" }));
    const points = (explained.running ?? []).map((probability, i) => ({ word: i + 1, probability }));
    if (points.length) chart.view.data("words", points);
    refresh();
    select(index);
    const top = read[index]?.offsetTop - words.offsetTop - words.clientHeight / 2;
    words.scrollTop = top || 0;
  }

  // Shows what depends on the choices.
  function refresh() {
    if (!current) return;
    // A linear model has one quantity.
    const tint = current.contribution ? "contribution" : $("tint").value;
    const values = directed(current[tint]) ?? [];
    const signed = ["contribution", "gradient", "leave_out"].includes(tint);
    // Influence has two signs, so its tint starts at zero. Gates and changes of state vary little,
    // so their tint starts at the minimum of the text.
    const sizes = values.map((value) => (signed ? Math.abs(value) : value));
    const least = signed ? 0 : sizes.reduce((a, b) => Math.min(a, b), Infinity);
    const most = sizes.reduce((a, b) => Math.max(a, b), -Infinity);
    read.forEach((option, i) => {
      const share = values.length && (sizes[i] - least) / (most - least || 1);
      option.style.setProperty("--tint", values[i] < 0 ? "var(--minus)" : "var(--plus)");
      option.style.setProperty("--amount", `${100 * share}%`);
    });
    legend.classList.toggle("signed", signed);
    legend.classList.toggle("none", !values.length);
    part(".low").textContent = number(signed ? -most : least);
    part(".high").textContent = number(most);
    if (active !== undefined) showFacts();
  }

  function select(index) {
    const option = read[index];
    if (index === active || !option) return;
    if (active !== undefined) read[active].ariaSelected = "false";
    active = index;
    option.ariaSelected = "true";
    words.setAttribute("aria-activedescendant", option.id);
    if (current.running) chart.view.signal("word", index + 1).run();
    showFacts();
  }

  function showFacts() {
    const both = Array.isArray(current.change) ? "" : ` (${$("direction").value})`;
    const of = (quantity) => directed(current[quantity])?.[active];
    facts.replaceChildren(...[
      ["word", `${read[active].textContent} (${active + 1} of ${read.length})`],
      [`update gate z${both}`, of("z"), number],
      [`reset gate r${both}`, of("r"), number],
      [`state change${both}`, of("change"), number],
      ["contribution", of("contribution"), number],
      ["gradient × input", of("gradient"), number],
      ["left out", of("leave_out"), number],
      ["probability so far", of("running"), percent],
    ].filter(([, value]) => value !== undefined).map(([name, value, written = String]) => {
      const fact = element("div");
      fact.append(element("dt", name), element("dd", written(value)));
      return fact;
    }));
    onselect(active);
  }

  // The index of the word on the next line above or below whose left edge is nearest.
  function line(step) {
    const { left, top } = read[active].getBoundingClientRect();
    let best = active, bestTop = null, nearest = Infinity;
    for (let i = active + step; read[i]; i += step) {
      const box = read[i].getBoundingClientRect();
      if ((box.top - top) * step < 4) continue;
      bestTop ??= box.top;
      if (Math.abs(box.top - bestTop) > 4) break;
      const away = Math.abs(box.left - left);
      if (away < nearest) [best, nearest] = [i, away];
    }
    return best;
  }

  words.onkeydown = (event) => {
    if (active === undefined) return;
    const ahead = getComputedStyle(words).direction === "rtl" ? -1 : 1;
    const next = {
      ArrowRight: () => active + ahead,
      ArrowLeft: () => active - ahead,
      ArrowDown: () => line(1),
      ArrowUp: () => line(-1),
      Home: () => 0,
      End: () => read.length - 1,
    }[event.key]?.();
    if (next === undefined) return;
    event.preventDefault();
    select(next);
    read[active].scrollIntoView({ block: "nearest", behavior: "instant" });
  };
  words.onpointerover = words.onclick = ({ target }) => {
    if (target !== words) select(read.indexOf(target));
  };
  // Screen readers announce the facts of the panel with the focus, not of the other panels.
  words.onfocus = () => { facts.ariaLive = "polite"; };
  words.onblur = () => { facts.ariaLive = "off"; };
  return { show, refresh, select };
}
