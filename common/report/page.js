// Draws the charts, switches light and dark, and runs the gate explorer. What came from data is
// only ever put into text nodes.
const { charts, explorer } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const chart = (name) => document.querySelector(`[data-chart="${name}"]`);

const element = (tag, textContent = "", properties = {}) =>
  Object.assign(document.createElement(tag), { textContent, ...properties });

// ast: Vega interprets its expressions, so that the page's security policy need not allow eval.
async function draw(place) {
  const options = { ast: true, renderer: "svg", actions: false };
  place.view = (await vegaEmbed(place, charts[place.dataset.chart], options)).view;
}

// The loss chart's zoom without a mouse: each button sets the range of epochs that is shown.
function zoomButtons(place) {
  const { view } = place;
  const all = charts.loss.layer[0].encoding.x.scale.domain;
  // Makes the range wider by a factor, and moves it by a share of its width.
  const zoom = (factor, share = 0) => () => {
    const [from, to] = view.scale("x").domain();
    const middle = (from + to) / 2 + share * (to - from), half = (factor * (to - from)) / 2;
    view.signal("zoom_epochs", [middle - half, middle + half]).run();
  };
  const buttons = element("div", "", { className: "zoom" });
  buttons.append(...[
    ["+", "zoom in", zoom(0.5)],
    ["−", "zoom out", zoom(2)],
    ["←", "earlier epochs", zoom(1, -0.25)],
    ["→", "later epochs", zoom(1, 0.25)],
    ["all", "all epochs", () => view.signal("zoom_epochs", all).run()],
  ].map(([sign, title, onclick]) =>
    element("button", sign, { type: "button", title, ariaLabel: title, onclick })));
  place.after(buttons);
}

function theme() {
  const select = $("theme");
  const apply = () => { document.documentElement.style.colorScheme = select.value; };
  // Some browsers have no storage for files.
  try { select.value = localStorage.getItem("theme") ?? ""; } catch { /* as said */ }
  if (select.selectedIndex < 0) select.value = "";
  apply();
  select.onchange = () => {
    apply();
    try { localStorage.setItem("theme", select.value); } catch { /* as said */ }
  };
}

// What is folded away on the screen is on paper, too, if it is not a hundred pages.
function printing() {
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open], .long)")];
    closed.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((part) => { part.open = false; }));
}

const MEANINGS = {
  z: "Mean of the update gate z over the hidden units: 0 keeps the state, 1 replaces it by the candidate.",
  change: "Norm of the change of the state that the word causes.",
  gradient: "Gradient × input of the predicted class's logit. Blue speaks for the prediction, orange against it.",
  leave_out: "How far the predicted class's logit falls when the word is left out. Blue speaks for the prediction, orange against it.",
};

function startExplorer() {
  const [model, review, tint, direction] = ["model", "review", "tint", "direction"].map($);
  const words = $("words"), running = chart("running").view;
  const number = (value) => (value === null ? "not a number" : value.toFixed(3));
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  let current, active;

  const names = new Set(explorer.reviews.flatMap(({ models }) => Object.keys(models)));
  model.append(...[...names].map((name) => element("option", name, { value: name })));

  // A value per word; of a bidirectional model, in the direction that is chosen.
  const values = (quantity) => {
    const found = current[quantity];
    return Array.isArray(found) ? found : found[direction.value];
  };

  function listReviews() {
    const before = review.value;
    const groups = [["classified correctly", true], ["classified wrongly", false]];
    review.replaceChildren(...groups.map(([label, right]) => {
      const group = element("optgroup", "", { label });
      explorer.reviews.forEach(({ text, true: truth, models }, value) => {
        const found = models[model.value];
        if (!found || (found.predicted === truth) !== right) return;
        const start = text.length > 60 ? `${text.slice(0, 60)}…` : text;
        // First strong isolate: the review's direction of writing stays its own.
        group.append(element("option", `${truth}: \u2068${start}\u2069`, { value }));
      });
      return group;
    }).filter((group) => group.childElementCount));
    if ([...review.options].some(({ value }) => value === before)) review.value = before;
  }

  function showReview() {
    const { text, true: truth, words: texts, models } = explorer.reviews[review.value];
    current = models[model.value];
    const two = explorer.classes.length === 2;
    $("directions").hidden = Array.isArray(current.z);
    $("verdict").textContent =
      `True class: ${truth}. ${model.value} says ${current.predicted}, with probability ` +
      `${percent(current.probability)}: ${current.predicted === truth ? "right" : "wrong"}.`;
    $("running-title").textContent =
      `The probability of ${two ? explorer.classes[1] : current.predicted} after each word`;
    $("text").textContent = text;
    words.replaceChildren(...texts.map((word, index) =>
      element("span", word, { id: `word-${index}`, role: "option", ariaSelected: "false" })));
    words.scrollTop = 0;
    active = undefined;
    running.data("words", current.running.map((probability, i) => ({ word: i + 1, probability })));
    showTint();
    select(0);
  }

  function showTint() {
    const found = values(tint.value);
    const signed = tint.value === "gradient" || tint.value === "leave_out";
    // Influence has two signs, and its tints grow from zero; gates and changes of state lie close
    // together, and theirs from the least of the review.
    const sizes = found.map((value) => (signed ? Math.abs(value) : value));
    const least = signed ? 0 : sizes.reduce((a, b) => Math.min(a, b), Infinity);
    const most = sizes.reduce((a, b) => Math.max(a, b), -Infinity);
    [...words.children].forEach((option, index) => {
      const share = (sizes[index] - least) / (most - least || 1);
      option.style.setProperty("--tint", found[index] < 0 ? "var(--minus)" : "var(--plus)");
      option.style.setProperty("--amount", `${100 * share}%`);
    });
    $("legend").classList.toggle("signed", signed);
    $("low").textContent = number(signed ? -most : least);
    $("high").textContent = number(most);
    $("meaning").textContent = MEANINGS[tint.value];
  }

  function select(index) {
    if (index === active || !words.children[index]) return;
    if (active !== undefined) words.children[active].ariaSelected = "false";
    active = index;
    const option = words.children[active];
    option.ariaSelected = "true";
    words.setAttribute("aria-activedescendant", option.id);
    const both = Array.isArray(current.z) ? "" : ` (${direction.value})`;
    const facts = [
      ["word", `${option.textContent} (${index + 1} of ${words.childElementCount})`],
      [`update gate z${both}`, number(values("z")[index])],
      [`reset gate r${both}`, number(values("r")[index])],
      [`state change${both}`, number(values("change")[index])],
      ["gradient × input", number(current.gradient[index])],
      ["left out", number(current.leave_out[index])],
      ["probability so far", percent(current.running[index])],
    ];
    $("word").replaceChildren(...facts.map(([name, value]) => {
      const fact = element("div");
      fact.append(element("dt", name), element("dd", value));
      return fact;
    }));
    running.signal("word", index + 1).run();
  }

  // The word above or below: the nearest to the left edge of this one, on the next line.
  function line(step) {
    const { left, top } = words.children[active].getBoundingClientRect();
    let best = active, bestTop = null, nearest = Infinity;
    for (let i = active + step; words.children[i]; i += step) {
      const box = words.children[i].getBoundingClientRect();
      if ((box.top - top) * step < 4) continue;
      bestTop ??= box.top;
      if (Math.abs(box.top - bestTop) > 4) break;
      const away = Math.abs(box.left - left);
      if (away < nearest) [best, nearest] = [i, away];
    }
    return best;
  }

  words.onkeydown = (event) => {
    const ahead = getComputedStyle(words).direction === "rtl" ? -1 : 1;
    const next = {
      ArrowRight: () => active + ahead,
      ArrowLeft: () => active - ahead,
      ArrowDown: () => line(1),
      ArrowUp: () => line(-1),
      Home: () => 0,
      End: () => words.childElementCount - 1,
    }[event.key]?.();
    if (next === undefined || active === undefined) return;
    event.preventDefault();
    select(next);
    words.children[active].scrollIntoView({ block: "nearest", behavior: "instant" });
  };
  words.onpointerover = words.onclick = ({ target }) => {
    if (target !== words) select([...words.children].indexOf(target));
  };
  model.onchange = () => { listReviews(); showReview(); };
  review.onchange = showReview;
  tint.onchange = showTint;
  direction.onchange = () => { const word = active; active = undefined; showTint(); select(word); };
  listReviews();
  showReview();
}

async function start() {
  theme();
  printing();
  await Promise.all([...document.querySelectorAll(".chart")].map(draw));
  if (charts.loss) zoomButtons(chart("loss"));
  if (explorer) startExplorer();
  document.documentElement.dataset.ready = Math.round(performance.now());
}
start();
