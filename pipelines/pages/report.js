// The face sheets of the report: views, a filter, pages. Only one page of faces exists at a time.
const data = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 12;

function drawFace(number, first) {
  const [name, confidence, distance, picture] = data.faces[number];
  const caption = `${name}, ${data.certainty} ${confidence.toFixed(2)}`
    + (distance == null ? "" : `, ${distance.toFixed(2)} from the medoid`);
  const inner = picture
    ? make("img", { src: `data:image/webp;base64,${picture}`, alt: "", loading: "lazy", decoding: "async" })
    : name;
  return make("button", {
    class: picture ? "face" : "face text", type: "button", title: caption, "aria-label": caption,
    tabindex: first ? 0 : -1, onclick: () => showFace(number),
  }, inner);
}

function drawFaces(numbers, size) {
  const group = make("div", { class: "faces", role: "group", "aria-label": count(size, "face") });
  const hidden = size - numbers.length;
  numbers.forEach((number, at) => {
    if (hidden && at === numbers.length - 12) {
      group.append(make("span", { class: "gap" }, `… ${hidden.toLocaleString("en")} between …`));
    }
    group.append(drawFace(number, at === 0));
  });
  moveWithArrows(group);
  return group;
}

function drawCluster(cluster) {
  return make("article", { class: "card sheet", "data-cluster": cluster.label },
    make("header", {},
      make("h3", {}, `Cluster ${cluster.label}`),
      make("span", {}, count(cluster.size, "image")),
      cluster.precision == null ? null : make("span", {}, `expected precision ${percent(cluster.precision)}`),
      cluster.weakest == null ? null : make("span", {}, `weakest link ${cluster.weakest.toFixed(2)}`)),
    drawFaces(cluster.faces, cluster.size));
}

const nameSide = (side) => (side.label < 0 ? "An image without label" : `Cluster ${side.label}`);

function drawQuestion(question, kind) {
  const sides = question.sides.map((side, at) => make("div", { class: "side" },
    make("h3", {}, kind === "merge" ? nameSide(side) : at ? "The other side" : "One side"),
    make("p", { class: "muted" }, count(side.size, "image")),
    drawFaces(side.faces, side.size)));
  const known = question.chance != null;
  const title = !known
    ? kind === "merge" ? "One person, or two?" : `Cluster ${question.sides[0].label}: one person, or two?`
    : kind === "merge"
    ? `${percent(question.chance)} likely one person`
    : `Cluster ${question.sides[0].label}: ${percent(1 - question.chance)} likely two people`;
  return make("article", { class: "card sheet" },
    make("header", {}, make("h3", {}, title),
      !known ? null : make("span", {}, `an answer corrects about ${count(about(question.worth), "pair")} of images`)),
    make("div", { class: "sides" }, ...sides));
}

function showFace(number) {
  const [name, confidence, distance, picture] = data.faces[number];
  const dialog = document.getElementById("face");
  const row = (term, text) => [make("dt", {}, term), make("dd", {}, text)];
  dialog.replaceChildren(
    picture ? make("img", { src: `data:image/webp;base64,${picture}`, alt: name }) : "",
    make("dl", {}, ...row("file", name), ...row(data.certainty, confidence.toFixed(3)),
      ...(distance == null ? [] : row("from the medoid", distance.toFixed(3)))),
    make("form", { method: "dialog" }, make("button", { autofocus: true }, "Close")));
  dialog.showModal();
}

// Faces are drawn once they are close to the visible part of the page, so that it opens quickly.
const nearby = new IntersectionObserver((entries) => {
  for (const entry of entries.filter(({ isIntersecting }) => isIntersecting)) {
    nearby.unobserve(entry.target);
    entry.target.dispatchEvent(new Event("near"));
  }
}, { rootMargin: "800px" });

// A list with pages; `draw` makes one item.
function makePager(place, perPage, draw) {
  const list = place.querySelector(".sheets");
  const position = place.querySelector("output");
  const [back, on] = place.querySelectorAll(".pager button");
  let items = [];
  let page = 0;
  let near = false;
  const show = () => {
    if (!near) return;
    const pages = Math.max(1, Math.ceil(items.length / perPage));
    page = Math.max(0, Math.min(page, pages - 1));
    list.replaceChildren(...items.slice(page * perPage, (page + 1) * perPage).map(draw));
    if (!items.length) list.append(make("p", { class: "missing" }, "Nothing here."));
    position.textContent = `page ${page + 1} of ${pages}`;
    back.disabled = page === 0;
    on.disabled = page === pages - 1;
  };
  const turn = (step) => { page += step; show(); };
  back.addEventListener("click", () => turn(-1));
  on.addEventListener("click", () => turn(1));
  place.addEventListener("keydown", (event) => {
    if (event.target.matches("input")) return;
    if (event.key === "PageDown" || event.key === "n") turn(1);
    else if (event.key === "PageUp" || event.key === "p") turn(-1);
    else return;
    event.preventDefault();
  });
  const come = () => { if (!near) { near = true; show(); } };
  place.addEventListener("near", come);
  window.addEventListener("beforeprint", come);
  nearby.observe(place);
  return { set(next) { items = next; page = 0; show(); } };
}

function startExplorer(place) {
  const pager = makePager(place, PER_PAGE, drawCluster);
  const views = {
    largest: data.largest.map((at) => data.clusters[at]),
    doubtful: data.doubtful.map((at) => data.clusters[at]),
    random: data.random.map((at) => data.clusters[at]),
    all: [...data.clusters].sort((a, b) => a.label - b.label),
  };
  const filter = place.querySelector("input[type=search]");
  const buttons = [...place.querySelectorAll("button[data-view]")];
  let view = "largest";
  const matches = (cluster, text) => (/^\d+$/.test(text)
    ? String(cluster.label) === text
    : cluster.faces.some((number) => data.faces[number][0].toLowerCase().includes(text)));
  const show = () => {
    const text = filter.value.trim().toLowerCase();
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.view === view)));
    pager.set(text ? views.all.filter((cluster) => matches(cluster, text)) : views[view]);
  };
  buttons.forEach((button) => button.addEventListener("click", () => {
    view = button.dataset.view;
    filter.value = "";
    show();
  }));
  let waiting = 0;
  filter.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(show, 120);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input, textarea")) return;
    event.preventDefault();
    filter.focus();
    filter.scrollIntoView({ block: "center" });
  });
  show();
}

// The map: one tab stop; a cluster, or an image without a label, is chosen by mouse or keys.
function startMap(place) {
  const map = place.querySelector("svg.map");
  const shown = place.querySelector(".shown");
  const nameOf = (point) => {
    const face = data.mapped[point];
    return typeof face === "number" ? data.faces[face][0] : face;
  };
  const clusterOf = new Map(data.clusters.map((cluster) => [cluster.label, cluster]));
  const items = [];
  const prepare = (item, label) => {
    item.setAttribute("role", "button");
    item.setAttribute("tabindex", items.length ? -1 : 0);
    item.setAttribute("aria-label", label);
    items.push(item);
  };
  for (const group of map.querySelectorAll("g.cluster")) {
    const cluster = clusterOf.get(Number(group.dataset.cluster));
    const size = cluster ? cluster.size : group.childElementCount;
    prepare(group, `Cluster ${group.dataset.cluster}, ${count(size, "image")}`);
  }
  for (const dot of map.querySelectorAll("g.alone circle")) prepare(dot, `${nameOf(dot.dataset.point)}, no label`);
  const centre = (item) => {
    const box = item.getBBox();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const focus = (item) => {
    for (const each of items) each.setAttribute("tabindex", each === item ? 0 : -1);
    item.focus();
  };
  const choose = (item, dot) => {
    map.classList.add("chosen");
    for (const each of map.querySelectorAll(".on, .here")) each.classList.remove("on", "here");
    item.classList.add("on");
    if (dot) dot.classList.add("here");
    const label = Number((item.dataset.cluster ?? -1));
    const cluster = clusterOf.get(label);
    const dots = [...(item.matches("circle") ? [item] : item.children)];
    const faces = dots.map((each) => data.mapped[each.dataset.point]).filter((face) => typeof face === "number");
    const lone = label < 0;
    shown.replaceChildren(
      make("p", {}, dot ? `Image ${nameOf(dot.dataset.point)}: ` : "", lone ? "it has no label." : `cluster ${label}.`),
      cluster ? drawCluster(cluster)
        : faces.length ? drawFaces(faces, faces.length)
          : make("p", { class: "muted" }, dots.slice(0, 50).map((each) => nameOf(each.dataset.point)).join(", ")));
  };
  map.addEventListener("click", (event) => {
    const dot = event.target.closest("circle");
    if (!dot) return;
    const item = dot.closest("g.cluster") || dot;
    focus(item);
    choose(item, dot);
  });
  map.addEventListener("keydown", (event) => {
    const item = document.activeElement;
    const at = items.indexOf(item);
    if (at < 0) return;
    let to = null;
    const steps = { n: 1, p: -1 };
    const ways = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    if (event.key === "Enter" || event.key === " ") choose(item, item.matches("circle") ? item : null);
    else if (event.key in steps) to = items[(at + steps[event.key] + items.length) % items.length];
    else if (event.key in ways) {
      const [x, y] = centre(item);
      const [right, down] = ways[event.key];
      let best = Infinity;
      for (const other of items) {
        const [dx, dy] = centre(other).map((each, axis) => each - [x, y][axis]);
        const along = dx * right + dy * down;
        const across = Math.abs(dx * down) + Math.abs(dy * right);
        if (along > 0.5 && along + 2 * across < best) [best, to] = [along + 2 * across, other];
      }
    } else return;
    event.preventDefault();
    if (to) focus(to);
  });
}

window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
for (const [id, kind] of [["merges", "merge"], ["bridges", "bridge"]]) {
  const place = document.getElementById(id);
  if (place && place.querySelector(".sheets")) {
    makePager(place, 4, (question) => drawQuestion(question, kind)).set(data[id]);
  }
}
const explorer = document.getElementById("clusters");
if (explorer && explorer.querySelector(".sheets")) startExplorer(explorer);
const mapped = document.getElementById("map");
if (mapped.querySelector("svg.map")) startMap(mapped);
document.documentElement.dataset.ready = "true";
