// The code of the report: its charts, printing, and the selection of the explorer's review.
const { charts, explorer } = JSON.parse(document.getElementById("data").textContent);

// Buttons that zoom the loss chart; each sets the range of epochs.
function zoomButtons(place) {
  const { view } = place;
  const all = charts.loss.layer[0].encoding.x.scale.domain;
  // Multiplies the width of the range by a factor, and moves it by a share of its width.
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

// Prints collapsed tables too, except those of a hundred pages.
function printing() {
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open], .long)")];
    closed.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((part) => { part.open = false; }));
}

function startExplorer() {
  const place = document.querySelector(".explorer"), [model, review] = ["model", "review"].map($);
  const { show, refresh } = panel(place);
  choices(refresh);
  const names = new Set(explorer.reviews.flatMap(({ models }) => Object.keys(models)));
  model.append(...[...names].map((name) => element("option", name, { value: name })));

  function listReviews() {
    const before = review.value;
    const groups = [["classified correctly", true], ["classified wrongly", false]];
    review.replaceChildren(...groups.map(([label, right]) => {
      const group = element("optgroup", "", { label });
      explorer.reviews.forEach(({ text, true: truth, models }, value) => {
        const explained = models[model.value];
        if (!explained || (explained.predicted === truth) !== right) return;
        const start = text.length > 60 ? `${text.slice(0, 60)}…` : text;
        // First strong isolate: the review keeps its own direction of writing.
        group.append(element("option", `${truth}: \u2068${start}\u2069`, { value }));
      });
      return group;
    }).filter((group) => group.childElementCount));
    if ([...review.options].some(({ value }) => value === before)) review.value = before;
  }

  function showReview() {
    const { text, true: truth, words, models } = explorer.reviews[review.value];
    const explained = models[model.value];
    $("directions").hidden = Array.isArray(explained.change);
    place.querySelector(".verdict").textContent =
      `True class: ${truth}. ${model.value} says ${explained.predicted}, with probability ` +
      `${percent(explained.probability)}: ${explained.predicted === truth ? "right" : "wrong"}.`;
    $("text").textContent = text;
    show(explained, words, words.keys(), explorer.classes);
  }

  model.onchange = () => { listReviews(); showReview(); };
  review.onchange = showReview;
  listReviews();
  return showReview;
}

async function start() {
  theme();
  printing();
  const showReview = explorer && startExplorer();
  await Promise.all([...document.querySelectorAll(".chart")].map((place) => draw(place, charts)));
  if (charts.loss) zoomButtons(document.querySelector('[data-chart="loss"]'));
  showReview?.();
  document.documentElement.dataset.ready = Math.round(performance.now());
}
start();
