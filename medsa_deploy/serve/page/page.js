// The page of medsa-deploy serve. Prompts live here: every request for masks carries all of them.

const $ = (id) => document.getElementById(id);
const COLOURS = ["#56b4e9", "#e69f00", "#cc79a7", "#f0e442", "#7fd9c4", "#ff8f6b", "#b39ddb", "#9ccc65"];
const PRESETS = [
  ["file", "file's own", null],
  ["full", "full range", null],
  ["abdomen", "CT abdomen", [-160, 240]],
  ["lung", "CT lung", [-1350, 150]],
  ["bone", "CT bone", [-450, 1050]],
  ["brain", "CT brain", [0, 80]],
];
const TOOLS = ["add", "remove", "box", "pan", "window"];
const OPPOSITE = { R: "L", L: "R", A: "P", P: "A", S: "I", I: "S" };
const BATCH_BYTES = 8 * 2 ** 20;
const RETRY_MS = 1000;
const FILL = 0.35;
const LATER_MS = 80; // planes that a click changes follow its own slice after this time
const SLOW_MS = 150; // an answer later than this is announced

const state = {
  token: sessionStorage.getItem("token") || "",
  lease: null, limits: null, bundles: [],
  image: null, files: [], serverPath: null, name: "", pixels: null, loaded: null, loading: 0, arrived: 0,
  labels: [null, null], // of the bundle, and of the one it is compared with
  segmented: [new Set(), new Set()], summary: [null, null], latency: [null, null],
  structures: [], active: 0, past: [], future: [], nextId: 1,
  follow: false, tool: "add", window: [0, 255], preset: "file",
  cross: [0, 0, 0], zoom: 1, pan: [0, 0], corner: null, drag: null, connected: false,
  request: null, latestTurn: 0, announcing: 0, latencies: [],
};
// For tests and the curious; nothing reads it.
globalThis.viewer = Object.assign(state, { toScreen });

// ------------------------------------------------------------------ talking to the server

class ServerError extends Error {
  constructor(status, detail, retryAfter) {
    super(detail);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  if (state.lease) headers["X-Lease-Token"] = state.lease;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let detail = response.statusText;
  try { detail = (await response.json()).detail || detail; } catch { /* no JSON */ }
  throw new ServerError(response.status, detail, Number(response.headers.get("Retry-After")) || 2);
}

const askJson = async (path, options) => (await ask(path, options)).json();
const sendJson = (path, data, options = {}) => ask(path, {
  method: "POST", body: JSON.stringify(data), headers: { "Content-Type": "application/json" }, ...options,
});
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** Do something until the server answers: reconnect after a restart, wait while it is busy. */
async function insist(work) {
  for (;;) {
    try {
      const result = await work();
      banner("");
      return result;
    } catch (error) {
      if (error.name === "AbortError") throw error;
      if (error instanceof ServerError) {
        if (error.status === 401) await askToken();
        else if (error.status === 410) await reconnect();
        else if (error.status === 503) {
          banner(`${sentence(error.message)} Trying again in ${error.retryAfter} s.`);
          await pause(1000 * error.retryAfter);
        } else throw error;
      } else if (error instanceof TypeError) {
        banner("The server does not answer. Your prompts are kept; this page goes on as soon as it is back.");
        state.connected = false;
        await pause(RETRY_MS);
        if (await alive()) await reconnect();
      } else throw error;
    }
  }
}

async function alive() {
  try { return (await fetch("/healthz")).ok; } catch { return false; }
}

/** A new lease, and the image again; the prompts are here. */
async function reconnect() {
  try {
    await claim();
    if (state.image) await sendImage();
  } catch (error) {
    if (!(error instanceof TypeError) && !(error instanceof ServerError && [410, 503].includes(error.status))) throw error;
  }
}

async function claim() {
  state.lease = null;
  const answer = await askJson("/api/lease", { method: "POST" });
  state.lease = answer.lease;
  state.limits = answer;
  state.connected = true;
  $("open-server").hidden = !answer.folder;
}

async function beat() {
  if (state.lease && state.connected) {
    try { await ask("/api/lease"); } catch (error) {
      if (error instanceof TypeError) insist(() => ask("/healthz")).catch(report);
    }
  }
  setTimeout(beat, (state.limits ? state.limits.liveness_seconds : 30) * 1000 / 3);
}

async function askToken() {
  const dialog = $("token-dialog");
  if (!dialog.open) dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  state.token = $("token").value.trim();
  sessionStorage.setItem("token", state.token);
}

// ------------------------------------------------------------------ opening images

async function openFiles(files) {
  const list = [...files].filter((file) => file.size > 0 && !file.name.startsWith("."));
  if (!list.length) return report(new Error("There is no file in it"));
  const total = list.reduce((sum, file) => sum + file.size, 0);
  if (state.limits && total > state.limits.upload_bytes) {
    return report(new Error(`These files have ${megabytes(total)}; the server takes ${megabytes(state.limits.upload_bytes)}`));
  }
  const name = list.length === 1 ? list[0].name : `${list.length} files`;
  await openImage({ files: list, serverPath: null, name });
}

async function openImage(source) {
  cancelRequest();
  const before = { files: state.files, serverPath: state.serverPath, name: state.name };
  Object.assign(state, source);
  try {
    const facts = await insist(sendImage);
    showImage(facts);
  } catch (error) {
    Object.assign(state, before);
    progress(null);
    if (state.image) await insist(sendImage).catch(() => { state.image = null; });
    progress(null);
    report(error);
  }
}

/** Send the files and have them read; the image's facts. */
async function sendImage() {
  const total = state.files.reduce((sum, file) => sum + file.size, 0);
  let sent = 0;
  if (state.serverPath === null) {
    await ask("/api/files", { method: "DELETE" });
    for (const file of state.files) {
      say(`Sending ${state.name}`);
      progress(total ? sent / total : null);
      await ask(`/api/files/${encodeURIComponent(file.name)}`, { method: "PUT", body: file });
      sent += file.size;
    }
  }
  say(`Reading ${state.name}`);
  progress(undefined);
  const facts = await (await sendJson("/api/image", { path: state.serverPath })).json();
  progress(null);
  return facts;
}

function showImage(facts) {
  const [height, width] = facts.slice_size;
  const channels = facts.colour ? 3 : 1;
  const voxels = facts.slices * height * width;
  const types = { u1: Uint8Array, i2: Int16Array, u2: Uint16Array };
  const stored = { k: facts.axis, r: facts.plane_axes[0], c: facts.plane_axes[1] };
  state.image = {
    ...facts, height, width, channels, stored,
    size: { k: facts.slices, r: height, c: width },
    stride: { k: height * width, r: width, c: 1 },
    mm: Object.fromEntries(Object.entries(stored).map(([axis, i]) => [axis, facts.spacing_mm[i]])),
  };
  state.pixels = new types[facts.pixels.type](voxels * channels);
  state.loaded = new Uint8Array(facts.slices);
  state.labels = [new Uint8Array(voxels), new Uint8Array(voxels)];
  state.segmented = [new Set(), new Set()];
  state.summary = [null, null];
  state.latency = [null, null];
  state.past = []; state.future = [];
  state.follow = false;
  state.structures = [];
  state.cross = [Math.floor(facts.slices / 2), Math.floor(height / 2), Math.floor(width / 2)];
  state.zoom = 1; state.pan = [0, 0];
  setPreset("file");
  addStructure(false);
  $("image-name").textContent = state.name;
  $("views").classList.remove("empty");
  $("export").disabled = false;
  $("slice").disabled = facts.slices < 2;
  $("slice").max = facts.slices - 1;
  for (const option of $("format").options) {
    if (option.value === "dicom-seg") option.disabled = facts.kind !== "dicom";
  }
  layout();
  say(`${facts.shape.join(" × ")} voxels`);
  loadPixels(++state.loading);
  segmentUnprompted();
}

/** Fetch the pixels of all slices, those near the shown one first. */
async function loadPixels(turn) {
  const image = state.image;
  const bytes = image.height * image.width * image.channels * state.pixels.BYTES_PER_ELEMENT;
  const batch = Math.max(1, Math.min(16, Math.floor(BATCH_BYTES / bytes)));
  for (;;) {
    const near = state.cross[0];
    let first = -1;
    for (let d = 0; d < image.slices && first < 0; d++) {
      if (near + d < image.slices && !state.loaded[near + d]) first = near + d;
      else if (near - d >= 0 && !state.loaded[near - d]) first = near - d;
    }
    if (first < 0 || turn !== state.loading) break;
    const count = state.loaded[near] ? batch : 1;
    let last = first + 1;
    while (last < image.slices && last - first < count && !state.loaded[last]) last++;
    try {
      const response = await insist(() => ask(`/api/pixels?first=${first}&last=${last}`));
      const content = await response.arrayBuffer();
      if (turn !== state.loading) return;
      state.pixels.set(new state.pixels.constructor(content), first * image.stride.k * image.channels);
      state.loaded.fill(1, first, last);
      state.arrived++;
      draw();
    } catch (error) { return report(error); }
  }
  draw();
}

// ------------------------------------------------------------------ structures and prompts

const bundleFacts = (which = 0) => state.bundles.find((b) => b.name === $(which ? "compare" : "bundle").value);
const severalClasses = () => Boolean(bundleFacts()?.several_classes);
const prompted = (s) => s.points.length + s.boxes.length > 0;
const copyOf = (structures) => structures.map((s) => ({ ...s, points: [...s.points], boxes: [...s.boxes] }));

function remember() {
  state.past.push({ structures: copyOf(state.structures), active: state.active });
  state.future = [];
}

function restore(from, to) {
  const moment = from.pop();
  if (!moment) return;
  to.push({ structures: copyOf(state.structures), active: state.active });
  state.structures = moment.structures;
  state.active = moment.active;
  listStructures();
  segment();
}

/** Drop the latest prompt; the masks are still those without it. */
function takeBack() {
  const moment = state.past.pop();
  state.structures = moment.structures;
  state.active = moment.active;
  listStructures();
  draw();
}

function addStructure(undoable = true) {
  if (undoable) remember();
  const number = state.structures.length;
  const used = new Set(state.structures.map((s) => s.name));
  const classes = bundleFacts()?.classes || [];
  const free = classes.find((c) => !state.structures.some((s) => s.className === c)) || classes[0];
  let name = `structure ${number + 1}`;
  for (let i = number + 2; used.has(name); i++) name = `structure ${i}`;
  const colour = COLOURS.find((c) => !state.structures.some((s) => s.colour === c)) || COLOURS[number % COLOURS.length];
  state.structures.push({
    id: state.nextId++, name, className: free, colour, visible: true, points: [], boxes: [],
  });
  state.active = state.structures.length - 1;
  listStructures();
}

function removeStructure(index) {
  remember();
  state.structures.splice(index, 1);
  state.active = Math.max(0, Math.min(state.active, state.structures.length - 1));
  if (!state.structures.length) addStructure(false);
  listStructures();
  segment();
}

/** The list anew; what had the focus in it keeps it. */
function listStructures() {
  const list = $("structures"), rows = [...list.children];
  const row = rows.findIndex((item) => item.contains(document.activeElement));
  const column = row < 0 ? -1 : [...rows[row].children].indexOf(document.activeElement);
  list.replaceChildren(...state.structures.map((structure, index) => {
    const item = document.createElement("li");
    item.className = index === state.active ? "active" : "";
    if (index === state.active) item.setAttribute("aria-current", "true");
    item.addEventListener("pointerdown", () => { if (state.active !== index) activate(index); });
    const colour = element("input", { type: "color", value: structure.colour, ariaLabel: `Colour of ${structure.name}` });
    colour.addEventListener("input", () => { structure.colour = colour.value; draw(); });
    const name = severalClasses() ? element("select", { ariaLabel: `Class ${index + 1}` }) : element("input", { type: "text", value: structure.name, ariaLabel: `Name ${index + 1}`, maxLength: 60, spellcheck: false });
    if (severalClasses()) {
      for (const c of bundleFacts().classes) name.append(new Option(c, c, false, c === structure.className));
      name.addEventListener("change", () => { remember(); structure.className = name.value; segment(); });
    } else {
      name.addEventListener("change", () => {
        const text = name.value.trim();
        const taken = state.structures.some((s) => s !== structure && s.name === text);
        if (!text || taken) name.value = structure.name;
        else { remember(); structure.name = text; segment(); }
      });
    }
    name.addEventListener("focus", () => { if (state.active !== index) activate(index, false); });
    const size = element("span", { className: "size", textContent: structure.size || "" });
    const eye = element("button", { textContent: structure.visible ? "◉" : "○", title: "Show or hide (V)", ariaLabel: `Show ${structure.name}` });
    eye.setAttribute("aria-pressed", String(structure.visible));
    eye.addEventListener("click", () => { structure.visible = !structure.visible; listStructures(); draw(); });
    const drop = element("button", { textContent: "✕", title: "Remove (Delete)", ariaLabel: `Remove ${structure.name}` });
    drop.addEventListener("click", () => removeStructure(index));
    item.append(colour, name, eye, drop, size);
    return item;
  }));
  if (row >= 0) list.children[Math.min(row, list.children.length - 1)]?.children[column]?.focus({ preventScroll: true });
  $("undo").disabled = !state.past.length;
  $("redo").disabled = !state.future.length;
}

function activate(index, relist = true) {
  state.active = (index + state.structures.length) % state.structures.length;
  if (relist) listStructures();
  else [...$("structures").children].forEach((item, i) => {
    item.classList.toggle("active", i === state.active);
    if (i === state.active) item.setAttribute("aria-current", "true"); else item.removeAttribute("aria-current");
  });
  draw();
}

/** A click on the pixel r, c of slice k. */
function click(k, r, c, label, time = performance.now()) {
  const structure = state.structures[state.active];
  remember();
  structure.points.push([...voxel(k, r, c), label]);
  segment(k, time, true);
  listStructures();
  draw();
}

function addBox(k, r0, c0, r1, c1, time = performance.now()) {
  const structure = state.structures[state.active];
  const low = voxel(k, Math.min(r0, r1), Math.min(c0, c1));
  const high = voxel(k + 1, Math.max(r0, r1) + 1, Math.max(c0, c1) + 1);
  remember();
  structure.boxes = structure.boxes.filter((b) => !(b[state.image.axis] === k));
  structure.boxes.push([...low, ...high]);
  segment(k, time, true);
  listStructures();
  draw();
}

/** Slice, row and column → x, y, z as the server counts them. */
function voxel(k, r, c) {
  const place = [0, 0, 0];
  const { stored } = state.image;
  place[stored.k] = k; place[stored.r] = r; place[stored.c] = c;
  return place;
}

function entries() {
  return state.structures.filter(prompted).map((s) => {
    const entry = severalClasses() ? { class: s.className } : { name: s.name };
    entry.points = s.points.map((p) => (p[3] ? p.slice(0, 3) : p));
    if (s.boxes.length) entry.boxes = s.boxes;
    if (!entry.points.length) delete entry.points;
    entry.colour = s.colour;
    return entry;
  });
}

const networkWindow = () => ({ bundle: null, shown: state.window, auto: "auto" })[$("network-window").value];

function wish(which = 0) {
  return {
    bundle: bundleFacts(which).name, structures: entries(), near: state.cross[0],
    propagate: state.follow && entries().length > 0, intensity_window: networkWindow(),
  };
}

// ------------------------------------------------------------------ masks

/** Label → the structure it shows, for the structures that are sent. */
function labelOwners(which) {
  const sent = state.structures.filter(prompted);
  const facts = bundleFacts(which);
  const owners = [];
  if (facts?.several_classes) {
    const known = sent.some((s) => facts.classes.includes(s.className));
    facts.classes.forEach((c, i) => {
      if (known || !sent.length) owners[i + 1] = (sent.length ? sent : state.structures).find((s) => s.className === c);
      else owners[i + 1] = { colour: COLOURS[i % COLOURS.length], visible: sent.some((s) => s.visible) };
    });
  } else sent.forEach((s, i) => { owners[i + 1] = s; });
  if (!sent.length && facts?.prompts !== "required") {
    facts?.classes.forEach((c, i) => { owners[i + 1] = state.structures[i]; });
  }
  return owners;
}

function cancelRequest() {
  state.request?.abort();
  state.request = null;
}

/** Ask for the masks of all prompts. `added`: a prompt that is taken back if the server refuses it. */
async function segment(near = state.cross[0], time = performance.now(), added = false) {
  cancelRequest();
  if (!state.image) return;
  const turn = ++state.latestTurn;
  $("follow").setAttribute("aria-pressed", String(state.follow));
  if (!entries().length && bundleFacts().prompts === "required") {
    for (const which of [0, 1]) clearLabels(which, new Set());
    for (const s of state.structures) s.size = "";
    state.summary = [null, null];
    progress(null); listStructures(); draw();
    say("Click on a structure");
    return;
  }
  const controller = new AbortController();
  state.request = controller;
  $("stop").disabled = false;
  state.announcing = setTimeout(() => {
    if (turn === state.latestTurn && state.request === controller) { say("Encoding the image"); progress(undefined); }
  }, SLOW_MS);
  try {
    for (const which of $("compare").value ? [0, 1] : [0]) {
      const start = which ? performance.now() : time;
      await insist(() => fetchMasks(which, near, controller.signal, start));
    }
    if (turn === state.latestTurn) say(state.follow ? "Followed through the volume" : "Done");
  } catch (error) {
    if (error.name !== "AbortError") {
      report(error);
      if (added && error.status === 422 && turn === state.latestTurn) takeBack();
      if (turn === state.latestTurn) { progress(null); $("stop").disabled = true; }
    }
    return;
  } finally { clearTimeout(state.announcing); }
  if (turn === state.latestTurn) { progress(null); $("stop").disabled = true; listStructures(); }
}

async function fetchMasks(which, near, signal, start) {
  const data = { ...wish(which), near };
  if (which) { // classes and names as the other bundle has them
    const { several_classes: several, classes } = bundleFacts(1);
    data.structures = data.structures.map(({ class: c, name, ...rest }, i) => {
      if (several) return classes.includes(c) ? { ...rest, class: c } : rest;
      return { ...rest, name: name || `structure ${i + 1}` };
    });
  }
  const seen = new Set();
  let drawn = false;
  const response = await sendJson("/api/masks", data, { signal });
  for await (const [facts, content] of frames(response.body.getReader())) {
    clearTimeout(state.announcing);
    if (facts.kind === "encoded") {
      say(state.follow ? `Following: slice ${facts.done} of at most ${facts.total}` : `Encoding slice ${facts.done} of ${facts.total}`);
      progress(facts.done / facts.total);
    } else if (facts.kind === "labels") {
      setLabels(which, facts.slice, content);
      seen.add(facts.slice);
      state.segmented[which].add(facts.slice);
      if (facts.slice === state.cross[0] && !drawn) {
        drawn = true;
        renderView(which ? "other" : "main"); // at once; the rest of the page can wait
        const ms = performance.now() - start;
        state.latency[which] = ms;
        if (!which) state.latencies.push(ms);
      }
      drawLater();
    } else if (facts.kind === "error") {
      if ([503, 410].includes(facts.status)) throw new ServerError(facts.status, facts.detail, 1);
      throw new ServerError(facts.status, facts.detail);
    } else if (facts.kind === "end") {
      clearLabels(which, new Set(facts.slices));
      state.summary[which] = facts;
      measure(which);
      draw();
      return;
    }
  }
  throw new TypeError("the answer was cut off");
}

async function* frames(reader) {
  let buffer = new Uint8Array(0);
  for (;;) {
    while (buffer.length >= 8) {
      const view = new DataView(buffer.buffer, buffer.byteOffset);
      const text = view.getUint32(0, true), labels = view.getUint32(4, true);
      if (buffer.length < 8 + text + labels) break;
      const facts = JSON.parse(new TextDecoder().decode(buffer.subarray(8, 8 + text)));
      yield [facts, buffer.slice(8 + text, 8 + text + labels)];
      buffer = buffer.slice(8 + text + labels);
    }
    const { done, value } = await reader.read();
    if (done) return;
    const joined = new Uint8Array(buffer.length + value.length);
    joined.set(buffer); joined.set(value, buffer.length);
    buffer = joined;
  }
}

function setLabels(which, k, content) {
  const { stride } = state.image;
  let place = k * stride.k;
  for (const word of new Uint32Array(content.buffer)) {
    const length = word & 0xffffff;
    state.labels[which].fill(word >>> 24, place, place + length);
    place += length;
  }
}

function clearLabels(which, keep) {
  const size = state.image.stride.k;
  for (const k of state.segmented[which]) {
    if (!keep.has(k)) state.labels[which].fill(0, k * size, (k + 1) * size);
  }
  state.segmented[which] = keep;
}

function measure(which) {
  if (which) return;
  const summary = state.summary[0];
  const owners = labelOwners(0);
  for (const s of state.structures) s.size = "";
  summary.voxels.forEach((voxels, i) => {
    const owner = owners[i + 1];
    if (!owner) return;
    owner.voxels = voxels;
    owner.size = volumeText(voxels);
  });
  listStructures();
}

function volumeText(voxels) {
  const ml = state.image.voxel_ml;
  return ml ? `${(voxels * ml).toPrecision(3)} ml` : `${voxels} ${state.image.kind === "picture" ? "px" : "vx"}`;
}

/** A network that takes no prompts segments its classes at once. */
function segmentUnprompted() {
  if (!state.image || bundleFacts()?.prompts === "required") return;
  if (bundleFacts().prompts === "none") {
    state.structures = [];
    for (const c of bundleFacts().classes) { addStructure(false); state.structures.at(-1).className = c; state.structures.at(-1).name = c; }
    state.active = 0;
    listStructures();
  }
  segment();
}

// ------------------------------------------------------------------ drawing

const VIEWS = { main: { fixed: "k" }, other: { fixed: "k" }, rows: { fixed: "r" }, columns: { fixed: "c" } };

/** Which data axes run along the screen, and whether they are flipped, so that patients look as usual:
 *  their right on the left, anterior or superior up. Without directions, as stored. */
function orient(fixed) {
  const plain = { k: ["c", "r"], r: ["c", "k"], c: ["r", "k"] }[fixed];
  const side = (axis) => state.image.directions?.[state.image.stored[axis]];
  let [h, v] = plain;
  if (!state.image.directions || (state.image.kind === "dicom" && fixed === "k")) return { h, v, fh: false, fv: false };
  const rank = (axis) => "RL".includes(side(axis)) ? 0 : "AP".includes(side(axis)) ? 1 : 2;
  if (rank(h) > rank(v)) [h, v] = [v, h];
  return { h, v, fh: "RAS".includes(side(h)), fv: "RAS".includes(side(v)) };
}

function canvasOf(name) { return $(`view-${name}`).querySelector("canvas"); }

/** Where a plane lies on its canvas: pixels per mm, and its middle. */
function placement(name) {
  const canvas = canvasOf(name), image = state.image, { h, v } = orient(VIEWS[name].fixed);
  const width = canvas.clientWidth, height = canvas.clientHeight;
  const wide = image.size[h] * image.mm[h], high = image.size[v] * image.mm[v];
  const side = name === "rows" || name === "columns";
  const scale = Math.min(width / wide, height / high) * (side ? 0.96 : 0.98 * state.zoom);
  const [px, py] = side ? [0, 0] : state.pan;
  return { scale, x: width / 2 + px - scale * wide / 2, y: height / 2 + py - scale * high / 2, wide: wide * scale, high: high * scale };
}

/** A place on a canvas → [k, r, c], fractions of pixels included. */
function locate(name, x, y) {
  const image = state.image, { fixed } = VIEWS[name], { h, v, fh, fv } = orient(fixed);
  const p = placement(name);
  const along = { [fixed]: state.cross["krc".indexOf(fixed)] };
  const u = (x - p.x) / p.wide * image.size[h], w = (y - p.y) / p.high * image.size[v];
  along[h] = fh ? image.size[h] - u : u;
  along[v] = fv ? image.size[v] - w : w;
  return ["k", "r", "c"].map((axis) => along[axis]);
}

/** The inverse of `locate`, for the edge or middle of pixels. */
function toScreen(name, place) {
  const image = state.image, { h, v, fh, fv } = orient(VIEWS[name].fixed);
  const p = placement(name), at = (axis) => place["krc".indexOf(axis)];
  const u = fh ? image.size[h] - at(h) : at(h), w = fv ? image.size[v] - at(v) : at(v);
  return [p.x + u / image.size[h] * p.wide, p.y + w / image.size[v] * p.high];
}

const inImage = (place) => ["k", "r", "c"].every((axis, i) => place[i] >= 0 && place[i] < state.image.size[axis]);

let drawing = 0, later = 0;
function draw() {
  if (!drawing) drawing = requestAnimationFrame(() => { drawing = 0; render(); });
}

/** Draw soon, with what else comes until then. */
function drawLater() {
  if (!later) later = setTimeout(() => { later = 0; draw(); }, LATER_MS);
}

const offscreen = {};
function planeCanvas(key, width, height) {
  const kept = offscreen[key];
  if (kept && kept.width === width && kept.height === height) return kept;
  return (offscreen[key] = Object.assign(document.createElement("canvas"), { width, height }));
}

function render() {
  if (!state.image) return;
  $("slice").value = state.cross[0];
  $("slice-text").textContent = `slice ${state.cross[0] + 1} / ${state.image.slices}`;
  for (const name of Object.keys(VIEWS)) {
    if (!$(`view-${name}`).hidden) renderView(name);
  }
  showFigures();
}

function renderView(name) {
  const canvas = canvasOf(name), ratio = devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
  const { fixed } = VIEWS[name], axes = orient(fixed), p = placement(name);
  const { size, stride } = state.image;
  const nh = size[axes.h], nv = size[axes.v];
  const sh = stride[axes.h] * (axes.fh ? -1 : 1), sv = stride[axes.v] * (axes.fv ? -1 : 1);
  const start = state.cross["krc".indexOf(fixed)] * stride[fixed]
    + (axes.fh ? (nh - 1) * stride[axes.h] : 0) + (axes.fv ? (nv - 1) * stride[axes.v] : 0);
  context.drawImage(greyLayer(name, { width, height, ratio, p, start, sh, sv, nh, nv }), 0, 0, canvas.clientWidth, canvas.clientHeight);
  const overlay = planeCanvas(`overlay ${name}`, nh, nv);
  paintLabels(overlay, name === "other" ? 1 : 0, start, sh, sv);
  context.imageSmoothingEnabled = false;
  context.drawImage(overlay, p.x, p.y, p.wide, p.high);
  if (fixed === "k" && $("prompts-shown").checked) drawPrompts(context, name);
  if (state.image.slices > 1 || document.activeElement === canvas) drawCross(context, name);
  drawLetters(context, canvas, axes);
}

/** The image of a view on the screen's pixels. A click changes only what lies above it. */
function greyLayer(name, { width, height, ratio, p, start, sh, sv, nh, nv }) {
  const layer = planeCanvas(`layer ${name}`, width, height);
  const key = [state.loading, state.arrived, ...state.window, start, ratio, p.x, p.y, p.wide].join();
  if (layer.key === key) return layer;
  layer.key = key;
  const grey = planeCanvas(`grey ${name}`, nh, nv);
  paintGrey(grey, start, sh, sv);
  const context = layer.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width / ratio, height / ratio);
  context.imageSmoothingEnabled = p.scale < 8;
  context.imageSmoothingQuality = "high";
  context.drawImage(grey, p.x, p.y, p.wide, p.high);
  return layer;
}

function paintGrey(canvas, start, sh, sv) {
  const { pixels } = state, { channels, inverted } = state.image, { slope, intercept } = state.image.pixels;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const picture = context.createImageData(canvas.width, canvas.height), words = new Uint32Array(picture.data.buffer);
  const [low, high] = state.window;
  const gain = 255 * slope / (high - low), offset = 255 * (intercept - low) / (high - low);
  let i = 0;
  for (let y = 0; y < canvas.height; y++) {
    let place = start + y * sv;
    for (let x = 0; x < canvas.width; x++, place += sh) {
      if (channels === 3) {
        const [a, b, c] = [0, 1, 2].map((n) => clamp(pixels[3 * place + n] * gain + offset));
        words[i++] = 0xff000000 | c << 16 | b << 8 | a;
      } else {
        let v = pixels[place] * gain + offset;
        v = v < 0 ? 0 : v > 255 ? 255 : v | 0;
        if (inverted) v = 255 - v;
        words[i++] = 0xff000000 | v << 16 | v << 8 | v;
      }
    }
  }
  context.putImageData(picture, 0, 0);
}

const clamp = (v) => (v < 0 ? 0 : v > 255 ? 255 : v | 0);

function paintLabels(canvas, which, start, sh, sv) {
  const { width, height } = canvas, labels = state.labels[which];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const picture = context.createImageData(width, height), words = new Uint32Array(picture.data.buffer);
  const fills = new Uint32Array(256), edges = new Uint32Array(256);
  const fill = $("fill").checked, outline = $("outline").checked;
  labelOwners(which).forEach((owner, label) => {
    if (!owner?.visible) return;
    const [r, g, b] = rgb(owner.colour), word = b << 16 | g << 8 | r;
    if (fill) fills[label] = (Math.round(255 * FILL) << 24 | word) >>> 0;
    edges[label] = outline ? (0xff000000 | word) >>> 0 : fills[label];
  });
  for (let y = 0, i = 0; y < height; y++) {
    let place = start + y * sv;
    for (let x = 0; x < width; x++, i++, place += sh) {
      const label = labels[place];
      if (!label) continue;
      const inside = x > 0 && x < width - 1 && y > 0 && y < height - 1
        && labels[place - sh] === label && labels[place + sh] === label
        && labels[place - sv] === label && labels[place + sv] === label;
      words[i] = inside ? fills[label] : edges[label];
    }
  }
  context.putImageData(picture, 0, 0);
}

const rgb = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));

function drawPrompts(context, name) {
  const { stored } = state.image, k = state.cross[0];
  state.structures.forEach((structure, index) => {
    if (!structure.visible) return;
    context.globalAlpha = index === state.active ? 1 : 0.45;
    for (const box of structure.boxes) {
      if (box[stored.k] !== k) continue;
      drawBox(context, name, k, [box[stored.r], box[stored.c]], [box[stored.r + 3], box[stored.c + 3]]);
    }
    for (const point of structure.points) {
      if (point[stored.k] !== k) continue;
      const [x, y] = toScreen(name, [k, point[stored.r] + 0.5, point[stored.c] + 0.5]);
      drawPoint(context, x, y, point[3]);
    }
  });
  context.globalAlpha = 1;
  if (state.corner && name === "main") {
    const [, r, c] = state.corner, [, r1, c1] = state.drag?.place || state.cross;
    drawBox(context, name, k, [Math.min(r, r1), Math.min(c, c1)], [Math.max(r, r1) + 1, Math.max(c, c1) + 1]);
  }
}

function drawPoint(context, x, y, positive) {
  context.beginPath();
  context.arc(x, y, 7, 0, 7);
  context.fillStyle = positive ? "#009e73" : "#d55e00";
  context.fill();
  context.lineWidth = 1.6; context.strokeStyle = "#fff"; context.stroke();
  context.beginPath();
  context.moveTo(x - 3.5, y); context.lineTo(x + 3.5, y);
  if (positive) { context.moveTo(x, y - 3.5); context.lineTo(x, y + 3.5); }
  context.stroke();
}

function drawBox(context, name, k, low, high) {
  const [x0, y0] = toScreen(name, [k, ...low]), [x1, y1] = toScreen(name, [k, ...high]);
  for (const [colour, width] of [["#000a", 3.5], ["#f0e442", 1.6]]) {
    context.strokeStyle = colour; context.lineWidth = width;
    context.strokeRect(Math.min(x0, x1), Math.min(y0, y1), Math.abs(x1 - x0), Math.abs(y1 - y0));
  }
}

function drawCross(context, name) {
  const [x, y] = toScreen(name, state.cross.map((v) => v + 0.5)), p = placement(name);
  const focused = document.activeElement === canvasOf(name);
  if (name === "main" || name === "other") {
    if (!focused) return;
    context.strokeStyle = "#fffc"; context.lineWidth = 1;
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 5 * dx, y + 5 * dy); context.lineTo(x + 14 * dx, y + 14 * dy);
    }
    context.stroke();
    return;
  }
  context.strokeStyle = "#7cc7f5aa"; context.lineWidth = 1;
  context.beginPath();
  context.moveTo(p.x, y); context.lineTo(p.x + p.wide, y);
  context.moveTo(x, p.y); context.lineTo(x, p.y + p.high);
  context.stroke();
}

function drawLetters(context, canvas, { h, v, fh, fv }) {
  const side = (axis) => state.image.directions?.[state.image.stored[axis]];
  if (!side(h)) return;
  const [right, bottom] = [fh ? OPPOSITE[side(h)] : side(h), fv ? OPPOSITE[side(v)] : side(v)];
  const { clientWidth: w, clientHeight: high } = canvas;
  context.font = "600 12px system-ui, sans-serif";
  context.fillStyle = "#c9d4e0"; context.textAlign = "center"; context.textBaseline = "middle";
  for (const [text, x, y] of [[OPPOSITE[right], 12, high / 2], [right, w - 12, high / 2], [OPPOSITE[bottom], w / 2, 12], [bottom, w / 2, high - 12]]) {
    context.fillText(text, x, y);
  }
}

// ------------------------------------------------------------------ figures and words

function showFigures() {
  const image = state.image;
  if (!image) return;
  const counts = planeCounts(0, state.cross[0]), owners = labelOwners(0);
  const active = state.structures[state.active], label = owners.indexOf(active);
  const voxels = label > 0 ? counts[label] : 0;
  const squareCm = voxels * image.mm.r * image.mm.c / 100;
  const area = image.kind === "picture" ? `${voxels} px` : `${squareCm.toFixed(2)} cm²`;
  $("measure").textContent = voxels && active ? `${severalClasses() ? active.className : active.name}: ${area} in this slice${active.size && image.kind !== "picture" ? `, ${active.size}` : ""}` : "";
  $("latency").textContent = state.latency[0] === null ? "" : `mask in ${state.latency[0].toFixed(0)} ms`;
  $("latency").dataset.ms = state.latency[0] ?? "";
  const caption = (which) => {
    const ms = state.latency[which] === null ? "" : `   ${state.latency[which].toFixed(0)} ms`;
    const voxels = state.summary[which]?.voxels.reduce((sum, count) => sum + count, 0);
    return `${bundleFacts(which).name}${ms}${voxels ? `   ${volumeText(voxels)}` : ""}`;
  };
  const compared = Boolean($("compare").value);
  $("view-main").querySelector("figcaption").textContent = compared ? caption(0) : "";
  if (compared) {
    const dice = overlap();
    $("view-other").querySelector("figcaption").textContent = `${caption(1)}${dice === null ? "" : `   Dice ${dice.toFixed(3)}`}`;
  }
}

function planeCounts(which, k) {
  const counts = new Array(256).fill(0), { stride } = state.image;
  const plane = state.labels[which].subarray(k * stride.k, (k + 1) * stride.k);
  for (let i = 0; i < plane.length; i++) counts[plane[i]]++;
  return counts;
}

/** Dice of the two bundles' masks in the shown slice; null if both are empty. */
function overlap() {
  const { stride } = state.image, k = state.cross[0];
  const [a, b] = state.labels.map((labels) => labels.subarray(k * stride.k, (k + 1) * stride.k));
  let both = 0, sum = 0;
  for (let i = 0; i < a.length; i++) { both += (a[i] && b[i]) ? 1 : 0; sum += (a[i] ? 1 : 0) + (b[i] ? 1 : 0); }
  return sum ? 2 * both / sum : null;
}

function readout(place) {
  if (!place || !inImage(place)) { $("readout").textContent = ""; return; }
  const [k, r, c] = place.map(Math.floor), image = state.image;
  const index = k * image.stride.k + r * image.stride.r + c;
  const values = [...Array(image.channels)].map((_, n) => state.pixels[index * image.channels + n] * image.pixels.slope + image.pixels.intercept);
  $("readout").textContent = `${voxel(k, r, c).join(", ")}   ${values.map((v) => Number(v.toPrecision(5))).join(" ")}`;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(0)} MB`;
const element = (tag, properties) => Object.assign(document.createElement(tag), properties);
function say(text) { $("status").textContent = text; $("status").classList.remove("error"); }
function banner(text) { if ($("banner").textContent !== text) $("banner").textContent = text; $("banner").hidden = !text; }
function report(error) {
  if (error.name === "AbortError") return;
  say(sentence(error.message));
  banner(sentence(error.message));
}

/** A share from 0 to 1, undefined for work of unknown length, null for none. */
function progress(share) {
  const bar = $("progress");
  bar.hidden = share === null;
  if (share === undefined) bar.removeAttribute("value"); else if (share !== null) bar.value = share;
}

// ------------------------------------------------------------------ display settings

function setPreset(name) {
  state.preset = name;
  const preset = PRESETS.find(([key]) => key === name);
  const { window, range } = state.image || { window: [0, 255], range: [0, 255] };
  state.window = [...(preset?.[2] || (name === "full" ? range : window))];
  if (state.window[0] >= state.window[1]) state.window[1] = state.window[0] + 1;
  $("preset").value = name;
  windowChanged();
}

function windowChanged() {
  const own = $("preset").querySelector("[value=own]");
  own.textContent = `${state.window.map((v) => Number(v.toPrecision(4))).join(" … ")}`;
  own.hidden = state.preset !== "own";
  if (state.preset === "own") $("preset").value = "own";
  draw();
}

function setTool(tool) {
  state.tool = tool;
  state.corner = null;
  for (const button of document.querySelectorAll("[data-tool]")) {
    const chosen = button.dataset.tool === tool;
    button.setAttribute("aria-checked", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
  }
}

function setSlice(k) {
  if (!state.image) return;
  state.cross[0] = Math.max(0, Math.min(state.image.slices - 1, k));
  draw();
}

function zoomBy(factor, x, y) {
  const canvas = canvasOf("main");
  const [cx, cy] = [x ?? canvas.clientWidth / 2, y ?? canvas.clientHeight / 2];
  const zoom = Math.max(0.3, Math.min(40, state.zoom * factor)), real = zoom / state.zoom;
  state.pan = [
    (cx - canvas.clientWidth / 2) * (1 - real) + state.pan[0] * real,
    (cy - canvas.clientHeight / 2) * (1 - real) + state.pan[1] * real,
  ];
  state.zoom = zoom;
  draw();
}

function fit() { state.zoom = 1; state.pan = [0, 0]; draw(); }

function layout() {
  const volume = Boolean(state.image) && state.image.slices > 1, compared = Boolean($("compare").value) && Boolean(state.image);
  $("views").classList.toggle("volume", volume);
  $("views").classList.toggle("compared", compared);
  $("view-rows").hidden = $("view-columns").hidden = !volume;
  $("view-other").hidden = !compared;
  $("slider").hidden = !volume;
  $("follow").disabled = !volume;
  draw();
}

function toggleFollow() {
  if ($("follow").disabled) return;
  state.follow = !state.follow;
  segment();
}

function stop() {
  if ($("stop").disabled && !state.follow) return;
  cancelRequest();
  $("stop").disabled = true;
  progress(null);
  if (state.follow) { state.follow = false; segment(); say("Stopped: only prompted slices are segmented"); }
}

// ------------------------------------------------------------------ export

async function save() {
  if (!state.image) return;
  const format = $("format").value;
  if (format === "prompts") {
    const content = JSON.stringify({ structures: entries() }, null, 1);
    download(new Blob([content], { type: "application/json" }), "prompts.json");
    say(command());
    return;
  }
  try {
    say("Exporting");
    const response = await insist(() => sendJson("/api/export", { ...wish(), format }));
    const suffix = { nifti: ".nii.gz", "dicom-seg": ".dcm", nrrd: ".seg.nrrd", png: ".png" }[format];
    download(await response.blob(), `segmentation${suffix}`);
    say(`Saved segmentation${suffix}`);
  } catch (error) { report(error); }
}

/** The command line that gives the same masks as this page. */
function command() {
  const words = ["medsa-deploy run", bundleFacts().name, state.image.kind === "picture" ? "IMAGE" : "VOLUME", "--prompts prompts.json"];
  if (state.follow) words.push("--propagate");
  const window = networkWindow();
  if (window) words.push(`--intensity-window ${window === "auto" ? "auto" : window.join(",")}`);
  return words.join(" ");
}

function download(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// ------------------------------------------------------------------ mouse, touch, keys

const touches = new Map();

function listen(name) {
  const canvas = canvasOf(name), side = name === "rows" || name === "columns";
  const at = (event) => [event.offsetX, event.offsetY];
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("pointerdown", (event) => {
    if (!state.image) return;
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    touches.set(event.pointerId, at(event));
    const place = locate(name, ...at(event));
    if (touches.size === 2) { state.corner = null; state.drag = { pinch: true }; return; }
    if (side) { state.drag = { side: true }; moveCross(name, place); return; }
    let kind = state.tool;
    if (event.button === 1) kind = "pan";
    else if (kind === "box" && event.button === 0 && !event.shiftKey) state.corner = inImage(place) ? place.map(Math.floor) : null;
    state.drag = { kind, from: at(event), last: at(event), place: place.map(Math.floor), button: event.button, moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!state.image) return;
    const place = locate(name, ...at(event));
    readout(place);
    if (touches.has(event.pointerId)) {
      if (touches.size === 2) { pinch(event, at(event)); return; }
      touches.set(event.pointerId, at(event));
    }
    const drag = state.drag;
    if (!drag || drag.pinch) return;
    if (drag.side) { moveCross(name, place); return; }
    const [dx, dy] = [at(event)[0] - drag.last[0], at(event)[1] - drag.last[1]];
    if (Math.hypot(at(event)[0] - drag.from[0], at(event)[1] - drag.from[1]) > 3) drag.moved = true;
    drag.last = at(event);
    if (drag.kind === "pan") { state.pan = [state.pan[0] + dx, state.pan[1] + dy]; draw(); }
    else if (drag.kind === "window") dragWindow(dx, dy);
    else if (drag.kind === "box" && state.corner) {
      drag.place = place.map((v, i) => Math.max(0, Math.min(state.image.size["krc"[i]] - 1, Math.floor(v))));
      draw();
    }
  });
  const release = (event) => {
    const count = touches.size;
    touches.delete(event.pointerId);
    const drag = state.drag;
    if (!drag || count > 1) { if (!touches.size) state.drag = null; return; }
    state.drag = null;
    if (event.type === "pointercancel" || drag.side || drag.pinch) { state.corner = null; return; }
    finish(name, drag, locate(name, ...at(event)), event);
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => readout(null));
  canvas.addEventListener("wheel", (event) => {
    if (!state.image) return;
    event.preventDefault();
    if (event.ctrlKey || state.image.slices === 1) zoomBy(Math.exp(-event.deltaY / 300), ...at(event));
    else if (side) scroll(name, Math.sign(event.deltaY));
    else setSlice(state.cross[0] + Math.sign(event.deltaY));
  }, { passive: false });
  canvas.addEventListener("focus", () => draw());
  canvas.addEventListener("blur", () => draw());
}

function finish(name, drag, place, event) {
  const time = performance.now(), [k, r, c] = place.map(Math.floor);
  if (drag.kind === "box" && state.corner && drag.moved && drag.button === 0) {
    const [, r0, c0] = state.corner, [, r1, c1] = drag.place;
    state.corner = null;
    addBox(k, r0, c0, r1, c1, time);
    return;
  }
  state.corner = null;
  if (drag.moved || drag.kind === "pan" || drag.kind === "window" || !inImage(place)) { draw(); return; }
  if (drag.kind === "box" && drag.button === 0 && !event.shiftKey) { draw(); return; }
  state.cross = [k, r, c];
  const negative = drag.button === 2 || event.shiftKey || drag.kind === "remove";
  click(k, r, c, negative ? 0 : 1, time);
}

function moveCross(name, place) {
  state.cross = place.map((v, i) => Math.max(0, Math.min(state.image.size["krc"[i]] - 1, Math.floor(v))));
  draw();
}

function scroll(name, step) {
  const i = "krc".indexOf(VIEWS[name].fixed);
  state.cross[i] = Math.max(0, Math.min(state.image.size["krc"[i]] - 1, state.cross[i] + step));
  draw();
}

function pinch(event, now) {
  const [id] = [...touches.keys()].filter((key) => key !== event.pointerId);
  const other = touches.get(id), before = touches.get(event.pointerId);
  const spread = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]);
  touches.set(event.pointerId, now);
  state.pan = [state.pan[0] + (now[0] - before[0]) / 2, state.pan[1] + (now[1] - before[1]) / 2];
  if (spread(before) > 8) zoomBy(spread(now) / spread(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
}

function dragWindow(dx, dy) {
  const [low, high] = state.window, [least, most] = state.image.range;
  const step = Math.max(most - least, 1) / 600;
  const level = (low + high) / 2 + dy * step, width = Math.max(step, high - low + dx * step);
  state.window = [level - width / 2, level + width / 2];
  state.preset = "own";
  windowChanged();
}

/** A step on the screen → a step of the cross. */
function nudge(dx, dy) {
  const { h, v, fh, fv } = orient("k");
  for (const [axis, flipped, step] of [[h, fh, dx], [v, fv, dy]]) {
    const i = "krc".indexOf(axis);
    state.cross[i] = Math.max(0, Math.min(state.image.size[axis] - 1, state.cross[i] + (flipped ? -step : step)));
  }
  readout(state.cross);
  draw();
}

function enter() {
  const [k, r, c] = state.cross;
  if (state.tool === "box") {
    if (!state.corner) { state.corner = [k, r, c]; draw(); return; }
    const [, r0, c0] = state.corner;
    state.corner = null;
    addBox(k, r0, c0, r, c);
  } else if (state.tool === "add" || state.tool === "remove") click(k, r, c, state.tool === "add" ? 1 : 0);
}

const KEYS = {
  ",": () => setSlice(state.cross[0] - 1), ".": () => setSlice(state.cross[0] + 1),
  PageUp: () => setSlice(state.cross[0] - 10), PageDown: () => setSlice(state.cross[0] + 10),
  "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(0.8), 0: fit,
  n: () => addStructure(), "[": () => activate(state.active - 1), "]": () => activate(state.active + 1),
  v: () => { const s = state.structures[state.active]; s.visible = !s.visible; listStructures(); draw(); },
  Delete: () => removeStructure(state.active),
  z: () => restore(state.past, state.future), Z: () => restore(state.future, state.past), y: () => restore(state.future, state.past),
  f: toggleFollow, Escape: () => { state.corner = null; stop(); draw(); },
  w: () => { const names = PRESETS.map(([key]) => key); setPreset(names[(names.indexOf(state.preset) + 1) % names.length]); },
  e: save,
};

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const tag = event.target.tagName, typing = tag === "SELECT" || (tag === "INPUT" && !["range", "checkbox"].includes(event.target.type));
  if (typing || event.altKey) return;
  if (event.key === "o" && !event.ctrlKey && !event.metaKey) { $("file-input").click(); return; }
  if (event.key === "?") { $("keys").showModal(); return; }
  if (!state.image) return;
  if (["1", "2", "3", "4", "5"].includes(event.key)) { setTool(TOOLS[event.key - 1]); return; }
  const onCanvas = tag === "CANVAS", arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (onCanvas && arrows[event.key]) {
    const [dx, dy] = arrows[event.key].map((d) => d * (event.shiftKey ? 10 : 1));
    if (state.tool === "pan") { state.pan = [state.pan[0] + 10 * dx, state.pan[1] + 10 * dy]; draw(); }
    else if (state.tool === "window") dragWindow(6 * dx, 6 * dy);
    else nudge(dx, dy);
    event.preventDefault();
    return;
  }
  if (onCanvas && (event.key === "Enter" || event.key === " ")) { enter(); event.preventDefault(); return; }
  if ((event.ctrlKey || event.metaKey) && !["z", "Z", "y"].includes(event.key)) return;
  const action = KEYS[event.key];
  if (action) { action(); event.preventDefault(); }
});

for (const button of document.querySelectorAll("[data-tool]")) {
  button.addEventListener("click", () => setTool(button.dataset.tool));
  button.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const next = TOOLS[(TOOLS.indexOf(state.tool) + step + TOOLS.length) % TOOLS.length];
    setTool(next);
    document.querySelector(`[data-tool=${next}]`).focus();
    event.preventDefault();
  });
}

// ------------------------------------------------------------------ drop, server folder, start

async function filesOf(items) {
  const files = [];
  const walk = async (entry) => {
    if (entry.isFile) files.push(await new Promise((done, fail) => entry.file(done, fail)));
    else if (entry.isDirectory) {
      const reader = entry.createReader();
      for (;;) {
        const batch = await new Promise((done, fail) => reader.readEntries(done, fail));
        if (!batch.length) break;
        for (const inner of batch) await walk(inner);
      }
    }
  };
  const entries = [...items].map((item) => item.webkitGetAsEntry?.() || item.getAsFile?.());
  for (const entry of entries.filter(Boolean)) {
    if (entry instanceof File) files.push(entry); else await walk(entry);
  }
  return files;
}

async function listServer(path) {
  const { entries: found } = await askJson(`/api/folder?path=${encodeURIComponent(path)}`);
  $("server-path").textContent = path || "/";
  const buttons = found.map(({ name, folder }) => {
    const button = element("button", { textContent: folder ? `${name}/` : name });
    const inner = path ? `${path}/${name}` : name;
    button.addEventListener("click", () => {
      if (folder) { listServer(inner).catch(report); return; }
      $("server-dialog").close();
      openImage({ files: [], serverPath: inner, name });
    });
    return button;
  });
  if (path) {
    const series = element("button", { textContent: "Open this folder as a series", className: "primary" });
    series.addEventListener("click", () => { $("server-dialog").close(); openImage({ files: [], serverPath: path, name: path }); });
    const up = element("button", { textContent: ".." });
    up.addEventListener("click", () => listServer(path.split("/").slice(0, -1).join("/")).catch(report));
    buttons.unshift(series, up);
  }
  $("server-entries").replaceChildren(...buttons.map((button) => { const item = element("li", {}); item.append(button); return item; }));
}

function listBundles() {
  $("bundle").replaceChildren(...state.bundles.map((b) => new Option(b.name, b.name)));
  $("compare").replaceChildren(new Option("nothing", ""), ...state.bundles.map((b) => new Option(b.name, b.name)));
  $("compare").disabled = state.bundles.length < 2;
}

function connectControls() {
  const on = (id, type, action) => $(id).addEventListener(type, action);
  on("open", "click", () => $("file-input").click());
  on("open-folder", "click", () => $("folder-input").click());
  on("open-server", "click", () => { $("server-dialog").showModal(); listServer("").catch(report); });
  for (const id of ["file-input", "folder-input"]) on(id, "change", () => { openFiles($(id).files); $(id).value = ""; });
  on("undo", "click", KEYS.z); on("redo", "click", KEYS.Z);
  on("help", "click", () => $("keys").showModal());
  on("add-structure", "click", () => state.image && addStructure());
  on("follow", "click", toggleFollow); on("stop", "click", stop); on("export", "click", save);
  on("slice", "input", () => setSlice(Number($("slice").value)));
  on("bundle", "change", () => { state.past = []; state.future = []; for (const s of state.structures) s.className = bundleFacts().classes[state.structures.indexOf(s) % bundleFacts().classes.length]; listStructures(); segmentUnprompted(); segment(); });
  on("compare", "change", () => { layout(); segment(); });
  on("network-window", "change", () => segment());
  on("preset", "change", () => setPreset($("preset").value));
  for (const id of ["fill", "outline", "prompts-shown"]) on(id, "change", () => draw());
  $("preset").replaceChildren(...PRESETS.map(([key, name]) => new Option(name, key)), new Option("", "own"));
  $("preset").querySelector("[value=own]").hidden = true;
  const views = $("views");
  views.addEventListener("dragover", (event) => { event.preventDefault(); views.classList.add("dropping"); });
  views.addEventListener("dragleave", () => views.classList.remove("dropping"));
  views.addEventListener("drop", async (event) => {
    event.preventDefault();
    views.classList.remove("dropping");
    openFiles(await filesOf(event.dataTransfer.items));
  });
  for (const name of Object.keys(VIEWS)) listen(name);
  new ResizeObserver(() => draw()).observe(views);
  addEventListener("pagehide", () => {
    if (state.lease) fetch("/api/lease", { method: "DELETE", keepalive: true, headers: { "X-Lease-Token": state.lease, ...(state.token ? { Authorization: `Bearer ${state.token}` } : {}) } });
  });
}

connectControls();
setTool("add");
layout();
try {
  await insist(async () => { state.bundles = (await askJson("/api/bundles")).bundles; });
  listBundles();
  await insist(claim);
  say("Open an image");
  document.body.dataset.ready = "true";
  beat();
} catch (error) { report(error); }
