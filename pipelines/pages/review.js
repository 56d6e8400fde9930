// The review page. Every answer is sent to the server at once; the page stores no decision.
let question = null;          // the question or opened cluster in the first tab
let asked = true;             // whether it is a question of the server
const marked = new Set();     // sample ids marked as not belonging
let chosen = null;            // a cluster chosen for merging, {label, ids}

const at = (id) => document.getElementById(id);
const ids = (side) => side.faces.map((face) => face.id);

async function call(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw Object.assign(new Error("the review server does not answer; is it still running?"), { number: null });
  }
  const value = await response.json();
  if (!response.ok) throw Object.assign(new Error(value.error), { number: value.number });
  return value;
}

function showMessage(text, good, ...more) {
  const place = at("message");
  place.className = good ? "good" : "";
  place.replaceChildren(text, ...more);
  place.hidden = !text;
}

// ------------------------------------------------------------------------------------ decisions

// One request at a time: a second key press during the first would answer the next question.
let busy = false;
async function runAlone(work) {
  if (busy) return;
  busy = true;
  try { await work(); } finally { busy = false; }
}

const made = [];              // numbers of the decisions of this page, for U
async function decide(action, groups, done, identity) {
  let answer;
  try {
    answer = await call("decisions", { action, groups, ...(identity == null ? {} : { identity }), ...who() });
  } catch (error) {
    const number = error.number;
    showMessage(error.message, false, number == null ? "" : make("button", {
      type: "button",
      onclick: () => runAlone(async () => { if (await undo(number)) await decide(action, groups, done, identity); }),
    }, `Undo ${number} and do this`));
    return;
  }
  const numbers = answer.numbers || [answer.number];
  const number = numbers.at(-1);
  made.push(...numbers);
  await refresh();
  showMessage(`${done} · decision ${numbers.join(", ")} is kept`, true,
    make("button", { type: "button", onclick: () => runAlone(() => undo(number)) }, "Undo (U)"));
}

async function undo(number) {
  try {
    await call("decisions", { action: "undo", number, ...who() });
  } catch (error) {
    showMessage(error.message, false);
    return false;
  }
  if (made.includes(number)) made.splice(made.indexOf(number), 1);
  await refresh();
  showMessage(`decision ${number} is undone`, true);
  return true;
}

const answers = {
  async same() {
    if (question.kind === "parts") {
      await decide("parts", question.sides.map(ids), count(question.sides.length, "part"));
      return;
    }
    const { identity, seems } = question;
    const groups = question.sides.map(ids);
    if (question.kind === "person") await decide("name", [groups[0]], `This is ${identity}`, identity);
    else if (question.kind === "doubt") {
      if (seems == null) showMessage("It seems to be nobody labelled: keep the name, or set the image aside.", false);
      else await decide("rename", [groups[0]], `Renamed to ${seems}`, seems);
    } else if (question.kind === "merge") await decide("merge", groups, "One person");
    else await decide("accept", [groups.flat()], "One person");
  },
  async several() {
    if (question.kind !== "cluster" && question.kind !== "bridge") return;
    try {
      question = await call("parts", { ids: question.sides.flatMap(ids) });
    } catch (error) {
      showMessage(error.message, false);
      return;
    }
    asked = false;
    marked.clear();
    drawQuestion();
  },
  async different() {
    if (question.kind === "cluster" || question.kind === "parts") {
      showMessage("Different people in one cluster: M proposes a cut, or mark those that do not belong and press X.", false);
      return;
    }
    const [one, other] = question.sides.map(ids);
    if (question.kind === "person") await decide("deny", [one], `Not ${question.identity}`, question.identity);
    else if (question.kind === "doubt") await decide("keep", [one], `The name ${question.identity} is kept`);
    else await decide(question.kind === "merge" ? "apart" : "split", [one, other], "Different people");
  },
  async split() {
    if (!marked.size) return;
    // Marked faces do not belong to the rest of their cluster.
    const whole = question.kind === "merge" ? question.sides.map(ids)
      : question.kind === "person" ? [ids(question.sides[0])] : [question.sides.flatMap(ids)];
    const touched = whole.filter((side) => side.some((id) => marked.has(id)));
    if (touched.length > 1) { showMessage("Marks lie in both clusters; split one after the other.", false); return; }
    const out = touched[0].filter((id) => marked.has(id));
    const rest = touched[0].filter((id) => !marked.has(id));
    if (!rest.length) { showMessage("All faces are marked; leave those that belong together.", false); return; }
    await decide("split", [out, rest], `${count(out.length, "face")} split off`);
  },
  async reject() {
    if (question.kind === "doubt") {
      const images = ids(question.sides[0]);
      await decide("exclude", [images], `${count(images.length, "labelled image")} set aside`);
    } else if (marked.size) await decide("reject", [[...marked]], `${count(marked.size, "face")} rejected`);
  },
  async skip() {
    if (asked) await call("skip", { name: question.name });
    showMessage("", true);
    await refresh();
  },
  async undo() {
    if (made.length) await undo(made.at(-1));
    else showMessage("This page has made no decision that is left to undo; the tab Decisions lists all.", false);
  },
};

// ---------------------------------------------------------------------------------------- faces

// What the number of a face is: "confidence", or "mean cosine" where no probability is known.
let certainty = "confidence";

// Faces of labelled images cannot be marked: a click shows them larger.
function drawFace(face, first) {
  const labelled = face.confidence == null;
  const caption = labelled ? `${face.name}, labelled` : `${face.name}, ${certainty} ${face.confidence.toFixed(2)}`;
  const button = make("button", {
    type: "button", class: face.picture ? "face" : "face text", title: caption, "aria-label": caption,
    "aria-pressed": labelled ? null : String(marked.has(face.id)), "data-id": face.id, draggable: String(!labelled),
    tabindex: first ? 0 : -1, onclick: () => (labelled ? enlarge(face) : mark(face.id)),
    ondragstart: (event) => event.dataTransfer.setData("text/plain", String(face.id)),
  }, face.picture
    ? make("img", { src: `face/${face.id}`, alt: "", loading: "lazy", draggable: "false" })
    : face.name);
  return button;
}

function mark(id, on) {
  if (on === undefined ? marked.has(id) : !on) marked.delete(id);
  else marked.add(id);
  for (const face of at("ask").querySelectorAll(`button.face[data-id="${id}"]`)) {
    face.setAttribute("aria-pressed", String(marked.has(id)));
  }
  drawTray();
}

const FEW = 240;
function drawFaces(faces) {
  const group = make("div", { class: "faces", role: "group", "aria-label": count(faces.length, "face") });
  group.append(...faces.slice(0, FEW).map((face, number) => drawFace(face, number === 0)));
  if (faces.length > FEW) {
    const more = make("button", {
      type: "button", onclick: () => { more.remove(); group.append(...faces.slice(FEW).map((face) => drawFace(face, false))); },
    }, `show ${(faces.length - FEW).toLocaleString("en")} more`);
    group.append(more);
  }
  moveWithArrows(group);
  return group;
}

function drawTray() {
  const tray = at("ask").querySelector(".tray");
  if (!tray) return;
  tray.textContent = marked.size
    ? `${count(marked.size, "face")} marked as not belonging`
    : "Click faces, or drag them here, that do not belong";
  for (const button of at("ask").querySelectorAll("button[data-marks]")) button.disabled = !marked.size;
}

function makeTray() {
  return make("div", {
    class: "tray", "aria-live": "polite",
    ondragover: (event) => { event.preventDefault(); event.currentTarget.classList.add("over"); },
    ondragleave: (event) => event.currentTarget.classList.remove("over"),
    ondrop: (event) => {
      event.preventDefault();
      event.currentTarget.classList.remove("over");
      const id = Number(event.dataTransfer.getData("text/plain"));
      if (question.sides.some((side) => side.faces.some((face) => face.id === id && face.confidence != null))) mark(id, true);
    },
  });
}

// ------------------------------------------------------------------------------------ questions

const titles = {
  merge: ["Are these two one person?", "Same person", "Different people"],
  bridge: ["One cluster, two sides: is it one person?", "One person", "Two people"],
  cluster: ["Is all of this one person?", "All one person", null],
  person: ["Is this the labelled person?", "Same person", "Different people"],
  doubt: ["Is this name right?", "Rename", "Keep the name"],
  parts: ["Does each part show one person, and no two the same?", "Yes, keep these parts", null],
};

function nameSide(side, number) {
  if (question.kind === "parts") return `Part ${number + 1}`;
  if (question.kind === "bridge") return ["One side", "The other side"][number];
  if (side.identity != null) return `Labelled: ${side.identity}`;
  if (question.kind === "doubt") return `Named ${question.identity}`;
  return side.label < 0 ? "An image without label" : `Cluster ${side.label}`;
}

// A focus inside the old question goes to the title of the new one, where it would be lost.
function showQuestion(...parts) {
  const inside = at("ask").contains(document.activeElement);
  at("ask").replaceChildren(...parts);
  if (inside) at("ask").querySelector("h2").focus();
}

function drawQuestion() {
  let [title, yes, no] = titles[question.kind];
  const { seems, identity } = question;
  if (question.kind === "person") [title, yes] = [`Is this ${identity}?`, `Yes, ${identity}`];
  if (question.kind === "doubt") {
    title = question.issue === "second_label" ? `Are ${identity} and ${seems} one person?` : `Is this ${identity}?`;
    yes = seems == null ? null : `No, ${seems}`;
    if (question.issue === "second_label") [yes, no] = [`Yes, call them ${seems}`, "No, keep both names"];
  }
  const doubt = question.kind === "doubt";
  const sides = question.sides.map((side, number) => {
    return make("div", { class: "side" },
      make("h3", {}, `${nameSide(side, number)} `, make("small", {}, count(side.size, "image"))), drawFaces(side.faces));
  });
  const evidence = doubt ? "likely misnamed" : question.kind === "person" ? "likely this labelled person" : question.kind === "cluster" ? "of its pairs are expected to be one person" : "likely one person";
  const explanation = question.kind === "parts"
    ? `Cut where pairs are less than ${(100 * question.threshold).toFixed(question.threshold > 0.99 ? 2 : 0)} % likely one person.`
      + (question.more ? ` ${count(question.more, "further image")} stay as they are.` : "")
    : !asked ? "Opened by hand."
    : question.chance == null ? "No quality is estimated in this run: how likely this is, is not known."
    : `${percent(question.chance)} ${evidence}; an answer corrects about `
    + `${count(about(question.worth), "pair")} of images.`;
  const act = (name, text, key, options) => make("button",
    { type: "button", "data-act": name, onclick: () => runAlone(answers[name]), ...options },
    `${text} `, make("kbd", {}, key));
  showQuestion(...[
    make("header", {}, make("h2", { tabindex: -1 }, title), make("p", { class: "muted" }, explanation)),
    make("div", { class: sides.length > 1 ? "sides" : "" }, ...sides),
    doubt ? null : makeTray(),
    make("div", { class: "answers" },
      yes ? act("same", yes, "S", { class: "primary" }) : null,
      no ? act("different", no, "D", {}) : null,
      ["cluster", "bridge"].includes(question.kind) ? act("several", "Several people", "M", {}) : null,
      doubt ? null : act("split", "Split off marked", "X", { "data-marks": "" }),
      doubt ? act("reject", "Set aside", "R", { class: "danger" })
        : act("reject", "Reject marked", "R", { "data-marks": "", class: "danger" }),
      act("skip", asked ? "Skip" : "Back to the questions", "K", { class: "spread" }))].filter((each) => each != null));
  const named = question.sides.map((side, number) => `${nameSide(side, number)}, ${count(side.size, "image")}`);
  at("announced").textContent = `${title} ${named.join("; ")}. ${explanation}`;
  drawTray();
}

function drawDone() {
  at("announced").textContent = "No open question is left";
  showQuestion(make("div", { class: "done card" },
    make("h2", { tabindex: -1 }, "No open question is left"),
    make("p", { class: "muted" }, "Browse the clusters, or end the review and run the pipeline again: it applies every decision.")));
}

async function refresh() {
  let value;
  try {
    value = await call("question");
  } catch (error) {
    showMessage(error.message, false);
    return;
  }
  asked = true;
  marked.clear();
  question = value.question;
  certainty = value.progress.certainty;
  if (question) drawQuestion(); else drawDone();
  const { decisions, pending, questions, missing, worth, reviewer, asked_at_most, estimated_f } = value.progress;
  if (!at("who").value) at("who").value = reviewer;
  at("progress").textContent = `${count(decisions, "decision")} · ${count(pending, "image")} will move · `
    + `${questions === asked_at_most ? "more than " : ""}${count(questions, "open question")}`
    + (certainty === "confidence" ? `, worth about ${count(about(worth), "pair")}` : "")
    + (estimated_f == null ? "" : ` · estimated F ${estimated_f.toFixed(3)}`)
    + (missing ? ` · ${count(missing, "image")} of earlier decisions gone` : "");
  if (!at("browse").hidden) await browse();
  if (!at("left").hidden) await showLeft();
  if (!at("history").hidden) await showHistory();
}

async function openCluster(label) {
  try {
    question = await call(`cluster/${label}`);
  } catch (error) {
    showMessage(error.message, false);
    return;
  }
  asked = false;
  marked.clear();
  showTab("ask");
  drawQuestion();
}

// ------------------------------------------------------------------------------------- clusters

let order = "size";
let offset = 0;
let sought = 0;
async function browse() {
  const text = at("browse").querySelector("input").value.trim();
  const number = ++sought;
  const found = await call(`clusters?${new URLSearchParams({ order, offset, text, sizes: at("browse").querySelector("select").value })}`);
  if (number !== sought) return;
  const [back, on] = at("browse").querySelectorAll(".pager button");
  back.disabled = offset === 0;
  on.disabled = offset + 24 >= found.total;
  const pages = Math.max(1, Math.ceil(found.total / 24));
  at("browse").querySelector("output").textContent = `page ${offset / 24 + 1} of ${pages}`;
  at("browse").querySelector(".sheets").replaceChildren(...found.clusters.map(drawSheet));
  at("chosen").textContent = chosen == null
    ? "Open a cluster to split, accept or reject in it; choose two to merge them."
    : `Cluster ${chosen.label} is chosen; choose the one to merge it with.`;
}

function drawSheet(cluster) {
  const mine = chosen != null && chosen.label === cluster.label;
  const hidden = cluster.size - cluster.faces.length;
  const faces = make("div", { class: "faces" }, ...cluster.faces.map((face) => make("span", { class: face.picture ? "face" : "face text", title: face.name },
    face.picture ? make("img", { src: `face/${face.id}`, alt: face.name, loading: "lazy" }) : face.name)),
    hidden ? make("span", { class: "gap" }, `+ ${hidden}`) : null);
  return make("article", { class: mine ? "card sheet chosen" : "card sheet", "data-cluster": cluster.label },
    make("header", {}, make("h3", {}, `Cluster ${cluster.label}`),
      make("span", {}, count(cluster.size, "image")),
      cluster.precision == null ? null : make("span", {}, `expected precision ${percent(cluster.precision)}`),
      make("span", { class: "acts" },
        make("button", { type: "button", onclick: () => openCluster(cluster.label) }, "Open"),
        make("button", { type: "button", onclick: () => runAlone(() => choose(cluster)) },
          mine ? "Do not merge" : chosen ? `Merge with ${chosen.label}` : "Merge …"))),
    faces);
}

async function choose(cluster) {
  if (chosen && chosen.label === cluster.label) chosen = null;
  else if (!chosen) chosen = { label: cluster.label, ids: ids((await call(`cluster/${cluster.label}`)).sides[0]) };
  else {
    const other = ids((await call(`cluster/${cluster.label}`)).sides[0]);
    const groups = [chosen.ids, other];
    chosen = null;
    await decide("merge", groups, "Merged");
    return;
  }
  await browse();
}

// -------------------------------------------------------------------------------------- history

const verbs = {
  accept: "is one person", merge: "are one person", split: "share no person", apart: "share no person",
  reject: "rejected", undo: "undo", name: "named", deny: "not", rename: "labelled, renamed to", keep: "labelled, name kept",
  exclude: "labelled, set aside",
};

async function showHistory() {
  const { decisions } = await call("decisions");
  if (!decisions.length) {
    at("history").replaceChildren(make("p", { class: "missing" }, "No decision yet."));
    return;
  }
  const rows = decisions.map((made) => make("tr", { class: made.active ? "" : "undone" },
    make("td", { class: "n" }, String(made.number)),
    make("td", {}, made.at.slice(0, 16).replace("T", " ")),
    make("td", {}, made.who),
    make("td", { class: "what" },
      ...made.faces.map((faces) => make("span", { class: "faces" }, ...faces.map((face) => make("span", { class: "face", title: face.name },
        face.picture ? make("img", { src: `face/${face.id}`, alt: face.name }) : "")))),
      made.action === "undo" ? `undo of ${made.undoes}`
        : `${made.sizes.join(" + ")} ${verbs[made.action]}${made.identity == null ? "" : ` ${made.identity}`}`),
    make("td", {}, made.active ? make("button", { type: "button", "data-undo": made.number, onclick: () => runAlone(() => undo(made.number)) }, "Undo") : "")));
  at("history").replaceChildren(make("div", { class: "card scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...["", "when (UTC)", "who", "what", ""].map((head) => make("th", {}, head)))),
    make("tbody", {}, ...rows))));
}

// ------------------------------------------------------------------------------------- left out

const left = { which: "unlabelled", kind: "", offset: 0, sought: 0 };
const PER_PAGE = 48;
async function showLeft() {
  const place = at("left");
  const text = place.querySelector("input").value.trim();
  const number = ++left.sought;
  const found = await call(`left-out/${left.which}?${new URLSearchParams({ kind: left.kind, offset: left.offset, text })}`);
  if (number !== left.sought) return;
  const every = found.reasons.reduce((sum, reason) => sum + reason.count, 0);
  place.querySelector("select").replaceChildren(
    make("option", { value: "" }, `any reason (${every.toLocaleString("en")})`),
    ...found.reasons.map(({ key, text: words, count: images }) => make("option",
      { value: key, selected: key === left.kind }, `${words} (${images.toLocaleString("en")})`)));
  const [before, after] = place.querySelectorAll(".pager button");
  before.disabled = left.offset === 0;
  after.disabled = left.offset + PER_PAGE >= found.total;
  place.querySelector("output").textContent = `page ${left.offset / PER_PAGE + 1} of ${Math.max(1, Math.ceil(found.total / PER_PAGE))}`;
  place.querySelector("p").textContent = !found.total ? "There is none."
    : left.which === "unlabelled" ? "Images of no cluster, those nearest to one first. Open one to see its neighbours."
      : "Files that the run did not use. Nothing can be decided about them here.";
  place.querySelector(".rows").replaceChildren(...found.images.map(drawLeft));
}

function drawLeft(image) {
  const source = left.which === "rejected" ? `rejected/${image.number}` : `face/${image.id}`;
  const picture = image.picture ? make("img", { src: source, alt: "", loading: "lazy" }) : null;
  const face = left.which === "rejected"
    ? make("span", { class: "face", title: image.picture ? image.name : "cannot be shown" }, picture)
    : make("button", { type: "button", class: "face", "aria-label": `${image.name}, larger`, onclick: () => enlarge(image) }, picture);
  return make("li", {}, face, make("div", {}, image.name, make("br"), make("small", {}, image.reason)));
}

// ------------------------------------------------------------------------------ a larger picture

const larger = [];            // the pictures opened one from the other
function enlargeFace(id) {
  const face = question && question.sides.flatMap((side) => side.faces).find((each) => each.id === id);
  if (face) enlarge(face);
}

async function enlarge(face, back = false) {
  if (!at("larger").open) larger.length = 0;
  if (!back) larger.push(face);
  const known = face.size_px[0] > 0;
  const rows = { file: face.name, "original size": known ? `${face.size_px[0]} x ${face.size_px[1]} px` : "unknown, the run has features",
    [certainty]: face.confidence == null ? "labelled" : face.confidence.toFixed(3),
    "distance to the middle": face.distance == null ? null : face.distance.toFixed(3),
    "cosine to the one before": face.cosine == null ? null : face.cosine.toFixed(3), in: face.cosine == null ? null : nameOwner(face) };
  const near = make("div", { class: "near", "aria-live": "polite" });
  at("larger").replaceChildren(...[
    make("div", { class: "head" },
      face.picture ? make("img", { src: `face/${face.id}`, alt: face.name }) : null,
      make("dl", {}, ...Object.entries(rows).filter(([, value]) => value != null)
        .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]))),
    make("h3", {}, "Nearest neighbours"), near,
    make("form", { method: "dialog" },
      larger.length > 1 ? make("button", { type: "button", onclick: () => { larger.pop(); enlarge(larger.at(-1), true); } }, "Back") : "",
      " ", make("button", { autofocus: true }, "Close (space)"))].filter((each) => each != null));
  if (!at("larger").open) at("larger").showModal();
  else at("larger").querySelector("[autofocus]").focus();
  at("larger").scrollTop = 0;
  try {
    const { neighbours } = await call(`neighbours/${face.id}`);
    near.replaceChildren(...(neighbours.length ? neighbours.map(drawNeighbour)
      : [make("p", { class: "missing" }, "This image is in no neighbour graph.")]));
  } catch (error) {
    near.replaceChildren(error.message);
  }
}

const nameOwner = (face) => (face.identity != null ? face.identity
  : face.cluster < 0 ? "no label" : `cluster ${face.cluster}`);

function drawNeighbour(face) {
  const caption = `${face.name}, cosine ${face.cosine.toFixed(2)}, ${nameOwner(face)}`;
  return make("figure", {},
    make("button", { type: "button", class: face.picture ? "face" : "face text", title: caption, "aria-label": caption, onclick: () => enlarge(face) },
      face.picture ? make("img", { src: `face/${face.id}`, alt: "", loading: "lazy" }) : face.name),
    make("figcaption", {}, make("b", {}, face.cosine.toFixed(2)), make("br"), nameOwner(face)));
}

// The name goes with every decision; it is kept for the next visit of this browser.
function who() {
  const name = at("who").value.trim();
  return name ? { who: name } : {};
}

// ---------------------------------------------------------------------------------------- start

function showTab(name) {
  for (const each of ["ask", "browse", "left", "history"]) at(each).hidden = each !== name;
  for (const button of document.querySelectorAll("[data-tab]")) {
    button.setAttribute("aria-pressed", String(button.dataset.tab === name));
  }
}

for (const button of document.querySelectorAll("[data-tab]")) {
  button.addEventListener("click", async () => {
    showTab(button.dataset.tab);
    showMessage("", true);
    if (button.dataset.tab === "browse") await browse();
    else if (button.dataset.tab === "left") await showLeft();
    else if (button.dataset.tab === "history") await showHistory();
    else await refresh();
  });
}
for (const button of document.querySelectorAll("[data-order]")) {
  button.addEventListener("click", () => {
    order = button.dataset.order;
    offset = 0;
    for (const each of document.querySelectorAll("[data-order]")) each.setAttribute("aria-pressed", String(each === button));
    browse();
  });
}
at("browse").querySelector("input").addEventListener("input", () => { offset = 0; browse(); });
at("browse").querySelector("select").addEventListener("change", () => { offset = 0; browse(); });
for (const button of document.querySelectorAll("[data-left]")) {
  button.addEventListener("click", () => {
    Object.assign(left, { which: button.dataset.left, kind: "", offset: 0 });
    for (const each of document.querySelectorAll("[data-left]")) each.setAttribute("aria-pressed", String(each === button));
    showLeft();
  });
}
at("left").querySelector("select").addEventListener("change", (event) => {
  Object.assign(left, { kind: event.target.value, offset: 0 });
  showLeft();
});
at("left").querySelector("input").addEventListener("input", () => { left.offset = 0; showLeft(); });
at("left").querySelectorAll(".pager button").forEach((button, number) => button.addEventListener("click", () => {
  left.offset += number ? PER_PAGE : -PER_PAGE;
  showLeft();
}));
const [back, on] = at("browse").querySelectorAll(".pager button");
back.addEventListener("click", () => { offset -= 24; browse(); });
on.addEventListener("click", () => { offset += 24; browse(); });
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (at("larger").open) {
    if (event.key === " " && !event.target.matches(".near button")) { event.preventDefault(); at("larger").close(); }
    return;
  }
  if (event.key === " " && event.target.matches("#ask button.face")) {
    event.preventDefault();
    enlargeFace(Number(event.target.dataset.id));
    return;
  }
  const name = { s: "same", d: "different", x: "split", r: "reject", k: "skip", u: "undo", m: "several" }[event.key.toLowerCase()];
  if (!name || at("ask").hidden || (!question && name !== "undo")) return;
  event.preventDefault();
  runAlone(answers[name]);
});
at("who").addEventListener("change", () => {
  if (at("who").value.trim()) localStorage.setItem("reviewer", at("who").value.trim());
});
at("who").value = localStorage.getItem("reviewer") || "";
refresh().then(() => { document.documentElement.dataset.ready = "true"; });
