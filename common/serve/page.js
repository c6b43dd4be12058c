// The server's page: asks runs about a text as it is typed, and shows a panel of each.
const [box, error, inside, order] = ["text", "error", "inside", "order"].map($);
const DEBOUNCE = 150, PATIENCE = 60_000; // ms
const NAMES = { z: "update gate z", r: "reset gate r", state: "state" };
// Those of the charts: the further a value is from the middle of its range, the less transparent,
// which fits a light and a dark page.
const ORANGE = [213, 94, 0], BLUE = [0, 114, 178];

const MAP = `
<figure>
<figcaption></figcaption>
<div class="legend signed" aria-hidden="true"><span></span><span class="scale"></span><span>1</span></div>
<div class="map"><canvas role="img"></canvas><div class="column"></div><div class="labels" aria-hidden="true"></div></div>
<p class="unit note"></p>
</figure>`;

// Requests a path from the server. Raises Error with a line for the user if the server refuses.
async function ask(path, question) {
  const options = question && {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(question),
  };
  let answer, content;
  try {
    answer = await fetch(path, { ...options, signal: AbortSignal.timeout(PATIENCE) });
    content = await answer.json();
  } catch { throw Error("The server gives no answer."); }
  if (!answer.ok) throw Error(content.error);
  return content;
}

// Adds to the place a picture of all units. onselect is told which word is pointed at.
function heatMap(place, onselect) {
  place.insertAdjacentHTML("beforeend", MAP);
  const figure = place.lastElementChild;
  const [caption, legend, map, canvas, labels, line] =
    ["figcaption", ".legend", ".map", "canvas", ".labels", ".unit"]
      .map((name) => figure.querySelector(name));
  figure.style.setProperty("--minus", `rgb(${ORANGE})`);
  figure.style.setProperty("--plus", `rgb(${BLUE})`);
  let words, values, rows;

  function paint(explanation) {
    const name = NAMES[inside.value], lowest = inside.value === "state" ? -1 : 0;
    words = explanation.words;
    values = directed(explanation.units[inside.value]); // of each unit at each word
    caption.textContent = values ? `The ${name} of each unit at each word` : `It has no ${name}`;
    map.hidden = legend.hidden = line.hidden = !values;
    if (!values) return;
    rows = values[0].map((_, unit) => unit);
    if (order.value) {
      const sums = rows.map((unit) => values.reduce((sum, word) => sum + word[unit], 0));
      rows.sort((a, b) => sums[b] - sums[a]);
    }
    const middle = (lowest + 1) / 2, pixels = new ImageData(words.length, rows.length);
    rows.forEach((unit, y) => values.forEach((word, x) => {
      const share = (word[unit] - middle) / (1 - middle);
      const pixel = [...(share < 0 ? ORANGE : BLUE), 255 * Math.abs(share)];
      pixels.data.set(pixel, 4 * (y * words.length + x));
    }));
    [canvas.width, canvas.height] = [words.length, rows.length];
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    const [least, most] = [Math.min, Math.max].map((of) => of(...values.map((at) => of(...at))));
    canvas.ariaLabel =
      `Heat map of the ${name}: ${words.length} words from left to right, ${rows.length} units ` +
      `from top to bottom, values from ${number(least)} to ${number(most)}`;
    legend.firstElementChild.textContent = lowest;
    map.style.setProperty("--words", words.length);
    map.style.setProperty("--units", rows.length);
    labels.replaceChildren(...words.map((word) => element("span", word)));
  }

  function mark(index, unit) {
    map.style.setProperty("--word", index);
    if (!values) return;
    const at = values[index], mean = at.reduce((a, b) => a + b) / at.length;
    const of = (one) => `${number(at[one])} (unit ${one + 1})`;
    const [least, most] = [Math.min, Math.max].map((extreme) => of(at.indexOf(extreme(...at))));
    const here = unit === undefined ? "" : `; here ${of(unit)}`;
    line.textContent =
      `${words[index]}: mean ${number(mean)}, least ${least}, most ${most}${here}`;
  }

  canvas.onpointermove = canvas.onclick = ({ offsetX, offsetY }) => {
    const { clientWidth, clientHeight } = canvas;
    const along = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)));
    const index = along(offsetX / clientWidth, words.length);
    onselect(index);
    mark(index, rows[along(offsetY / clientHeight, rows.length)]);
  };
  return { paint, mark };
}

// A run and its panel. onselect is told that a word is chosen, onanswer that there is news.
function served(run, onselect, onanswer) {
  const place = element("section", "", { className: "empty" }), output = element("output");
  const isLinear = !run.hidden_size;
  const about = [`${run.framework} ${run.model}`];
  about.push(isLinear ? "words tinted by what they contribute to the margin" : `${run.hidden_size} units`);
  if (run.num_layers > 1) about.push(`the last of ${run.num_layers} layers`);
  place.append(element("h2", run.name), element("p", about.join(", "), { className: "note" }));
  const { show, refresh, select } = panel(place, (index) => {
    it.index = index;
    mark(index);
    onselect(it);
  });
  const { paint, mark } = isLinear ? { paint() {}, mark() {} } : heatMap(place, select);
  let running, last;

  // One request at a time: the text typed meanwhile is sent next. No answer overtakes another, and
  // the server computes none that nobody reads.
  async function update() {
    if (running) return;
    running = true;
    await it.drawn;
    while (last !== box.value) {
      last = box.value;
      const question = { texts: [last], run: run.name, units: !isLinear };
      try {
        answer((await ask("explain", question)).explanations[0]);
        it.error = "";
      } catch ({ message }) {
        it.error = message;
        output.textContent = "";
      }
      place.classList.toggle("stale", Boolean(it.error));
      onanswer();
    }
    running = false;
  }

  function answer(explanation) {
    const { length } = explanation.words;
    output.textContent = `${explanation.predicted} ${percent(explanation.probability)}`;
    const known = length ? `${length} known word${length > 1 ? "s" : ""}` : "no known word";
    place.querySelector(".verdict").textContent = `${output.textContent} · ${known}`;
    place.classList.toggle("empty", !length);
    // A selection at the last word stays at the last word.
    const end = !it.explanation || it.index === it.explanation.words.length - 1;
    if (length) {
      it.explanation = explanation;
      paint(explanation);
    }
    const index = end ? length - 1 : Math.min(it.index, length - 1);
    show(explanation, explanation.all_words, explanation.places, run.classes, index);
  }

  const repaint = () => { if (it.explanation) { paint(it.explanation); refresh(); } };
  const it = { run, place, output, select, update, repaint };
  return it;
}

async function start() {
  theme();
  const [{ runs }, charts] = await Promise.all(["runs", "charts.json"].map((path) => ask(path)));
  const boxes = runs.map(({ name }) => element("input", "", { type: "checkbox", value: name }));
  const shown = () => all.filter((_, i) => boxes[i].checked);
  const same = (a, b) => a.explanation?.words.join(" ") === b.explanation?.words.join(" ");
  const chosen = (one) => shown().forEach((each) => { if (same(one, each)) each.select(one.index); });
  const failed = () => {
    error.textContent = [...new Set(shown().map((one) => one.error))].join(" ");
  };
  const all = runs.map((run) => served(run, chosen, failed));
  $("runs").append(...all.map(({ run, output }, i) => {
    const item = element("div"), label = element("label");
    label.append(boxes[i], run.name);
    item.append(label, output);
    return item;
  }));

  // A link to this page says which text and runs it shows.
  function update() {
    const state = shown().map(({ run }) => ["run", run.name]);
    history.replaceState(null, "", `#${new URLSearchParams([["text", box.value], ...state])}`);
    failed();
    return Promise.all(shown().map((one) => one.update()));
  }

  function arrange() {
    $("panels").replaceChildren(...shown().map(({ place }) => place));
    $("directions").hidden = !shown().some(({ run }) => run.bidirectional);
    all.forEach((one, i) => {
      one.output.hidden = !boxes[i].checked;
      if (boxes[i].checked) one.drawn ??= draw(one.place.querySelector(".chart"), charts);
    });
    dispatchEvent(new Event("resize")); // for the charts, which are wider or narrower now
    return update();
  }

  function restore() {
    const state = new URLSearchParams(location.hash.slice(1)), wanted = state.getAll("run");
    const known = wanted.filter((name) => boxes.some(({ value }) => value === name));
    boxes.forEach((each, i) => { each.checked = known.length ? known.includes(each.value) : i < 2; });
    box.value = state.get("text") ?? (box.value || runs[0].example);
    return arrange();
  }

  let timer;
  box.oninput = () => { clearTimeout(timer); timer = setTimeout(update, DEBOUNCE); };
  const repaint = () => shown().forEach((one) => one.repaint());
  boxes.forEach((each) => { each.onchange = arrange; });
  inside.onchange = order.onchange = repaint;
  onhashchange = restore;
  choices(repaint);
  await restore();
  document.documentElement.dataset.ready = Math.round(performance.now());
}
start().catch(({ message }) => { error.textContent = message; });
