// The page: choose a memory, fill it, ask, and see where the model looked. Text of documents and answers only ever
// becomes text nodes, never markup.

const at = (id) => document.getElementById(id);
const state = { model: "", key: sessionStorage.getItem("focusllm-key") || "", memory: "", asking: null, answer: null };

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

async function api(path, options = {}) {
  const headers = new Headers(options.headers || {});
  if (state.key) headers.set("Authorization", `Bearer ${state.key}`);
  if (typeof options.body === "string") headers.set("Content-Type", "application/json");
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    at("key-form").hidden = false;
    at("key").focus();
  }
  if (!response.ok) {
    let message = `${response.status} ${response.statusText}`;
    try { message = (await response.json()).error.message; } catch { /* not JSON */ }
    throw new Error(message);
  }
  return response;
}

const json = async (path, options) => (await api(path, options)).json();
const named = (memory) => `/v1/memories/${encodeURIComponent(memory)}`;

// -- server-sent events of a response ----------------------------------------------------------------------------

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const lines = held.slice(0, end).split("\n");
      held = held.slice(end + 2);
      const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// -- memories ----------------------------------------------------------------------------------------------------

// What is chosen may change while an answer of the server is on its way: every request names the memory it was made for.

async function showMemories(wanted) {
  const { data } = await json("/v1/memories");
  const select = at("memory");
  const chosen = wanted ?? state.memory;
  select.replaceChildren(...data.map((one) => element("option", `${one.name} (${one.documents})`, { value: one.name })));
  if (data.some((one) => one.name === chosen)) select.value = chosen;
  state.memory = select.value;
  await showDocuments();
}

async function showDocuments() {
  const memory = state.memory;
  const found = memory ? (await json(`${named(memory)}/documents`)).data : [];
  if (memory !== state.memory) return;
  at("document-count").textContent = String(found.length);
  at("documents").replaceChildren(...found.map((one) => {
    const row = element("li");
    const remove = element("button", "remove", { type: "button", "aria-label": `Remove ${one.id}` });
    remove.addEventListener("click", () => attempt(async () => {
      await api(`${named(memory)}/document?id=${encodeURIComponent(one.id)}`, { method: "DELETE" });
      await showMemories();
    }));
    row.append(element("span", one.id), remove);
    return row;
  }));
}

async function upload(files) {
  if (!files.length) return;
  const memory = state.memory;
  if (!memory) throw new Error("create a memory first");
  const form = new FormData();
  for (const file of files) form.append("files", file, file.webkitRelativePath || file.name);
  const change = await json(`${named(memory)}/files`, { method: "POST", body: form });
  at("indexing").hidden = false;
  const path = `${named(memory)}/indexing/${change.id}/events`;
  for await (const now of events(await api(path))) {
    at("progress").max = Math.max(now.tokens_total, 1);
    at("progress").value = now.tokens_done;
    at("progress-text").textContent = `${now.status}: ${now.tokens_done} of ${now.tokens_total} tokens`;
    if (now.error) throw new Error(now.error.message);
  }
  await showMemories();
}

// -- asking ------------------------------------------------------------------------------------------------------

async function ask() {
  const question = at("question").value.trim();
  if (!question) return;
  const memory = state.memory;
  state.asking = new AbortController();
  at("ask").disabled = true;
  at("stop").disabled = false;
  at("status").textContent = "reading";
  at("answer").textContent = "";
  at("citations").replaceChildren();
  at("map-section").hidden = at("passage-section").hidden = at("supported").hidden = true;
  const body = { model: state.model, stream: true, attention: true, template: "question",
    messages: [{ role: "user", content: question }], ...(memory ? { memories: [memory] } : {}) };
  try {
    const response = await api("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: state.asking.signal });
    let last = {};
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices[0].delta;
      if (delta.content) at("answer").append(delta.content);
      if (delta.content) at("status").textContent = "answering";
      if (chunk.choices[0].finish_reason) last = delta;
    }
    state.answer = { memory, text: at("answer").textContent, citations: [], ...last };
    showAnswer();
    at("status").textContent = "";
  } finally {
    at("ask").disabled = false;
    at("stop").disabled = true;
    state.asking = null;
  }
}

// indices count characters (code points), JavaScript's strings count UTF-16 units
const cutter = (text) => { const all = [...text]; return (from, to) => all.slice(Math.max(0, from), to).join(""); };

function showAnswer() {
  const { text, citations, attention, supported } = state.answer;
  const piece = cutter(text);
  at("supported").hidden = supported == null;
  at("supported").textContent = `The memory holds an answer: ${Math.round(100 * supported)}% likely`;
  at("citations").replaceChildren(...citations.map((one) => {
    const row = element("li");
    const open = element("button", sourceName(one), { type: "button" });
    open.addEventListener("click", () => attempt(() => read(one)));
    row.append(open, ` for “${piece(one.start, one.end)}”`);
    return row;
  }));
  if (!attention || !attention.chunks.length) return;
  const parts = [];
  let before = 0;
  attention.words.forEach((word, number) => {
    parts.push(piece(before, word.start));
    const open = element("button", piece(word.start, word.end), { type: "button" });
    open.addEventListener("click", () => attempt(() => read(attention.chunks[best(word)])));
    parts.push(open);
    before = word.end;
    open.title = `passage of ${attention.chunks[best(word)].document_title}, word ${number + 1}`;
  });
  at("answer").replaceChildren(...parts, piece(before));
  showMap(piece, attention);
}

const best = (word) => word.weights.indexOf(Math.max(...word.weights));

function showMap(piece, { chunks, words }) {
  const most = Math.max(...words.flatMap((word) => word.weights), 1e-9);
  const head = element("tr");
  head.append(element("td"), ...words.map((word) => element("th", piece(word.start, word.end), { scope: "col" })));
  const body = chunks.map((chunk, row) => {
    const line = element("tr");
    line.append(element("th", `${sourceName(chunk)} ${chunk.start_char_index}`, { scope: "row" }));
    for (const word of words) {
      const weight = word.weights[row];
      const label = `${piece(word.start, word.end)}, ${chunk.document_title}: ${(100 * weight / most).toFixed(0)}%`;
      const open = element("button", "", { type: "button", "aria-label": label, title: label, tabindex: "-1" });
      open.style.background = `rgb(var(--heat) / ${(weight / most).toFixed(3)})`;
      open.addEventListener("click", () => attempt(() => read(chunk)));
      const cell = element("td");
      cell.append(open);
      line.append(cell);
    }
    return line;
  });
  const thead = element("thead");
  thead.append(head);
  const tbody = element("tbody");
  tbody.append(...body);
  at("map").replaceChildren(thead, tbody);
  const cells = [...tbody.querySelectorAll("button")];
  if (cells.length) cells[0].tabIndex = 0;
  at("map-section").hidden = false;
}

// arrow keys walk the cells; one of them at a time is in the tab order
function walk(event) {
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  if (!step || event.target.tagName !== "BUTTON") return;
  const rows = [...at("map").tBodies[0].rows].map((row) => [...row.querySelectorAll("button")]);
  const row = rows.findIndex((cells) => cells.includes(event.target));
  const next = (rows[row + step[0]] || [])[rows[row].indexOf(event.target) + step[1]];
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// -- passages ----------------------------------------------------------------------------------------------------

const sourceName = (one) => one.document_title + (one.page ? `, page ${one.page}` : "");
const AROUND = 2000;

async function read(source) {
  const found = await json(`${named(state.answer.memory)}/document?id=${encodeURIComponent(source.document_id)}`);
  const [start, end] = [source.start_char_index, source.end_char_index];
  const cut = cutter(found.text);
  at("passage").replaceChildren(cut(start - AROUND, start), element("mark", cut(start, end)), cut(end, end + AROUND));
  at("passage-source").textContent = `${sourceName(source)}, characters ${start} to ${end}`;
  at("passage-section").hidden = false;
  at("passage").focus();
  at("passage").querySelector("mark").scrollIntoView({ block: "nearest" });
}

// -- start -------------------------------------------------------------------------------------------------------

async function attempt(work) {
  try {
    at("status").classList.remove("failed");
    await work();
  } catch (error) {
    at("status").classList.toggle("failed", error.name !== "AbortError");
    at("status").textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
}

async function start() {
  const { data } = await json("/v1/models");
  state.model = data[0].id;
  at("model").textContent = state.model;
  at("key-form").hidden = true;
  await showMemories();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = at("key").value;
  sessionStorage.setItem("focusllm-key", state.key);
  attempt(start);
});
at("memory").addEventListener("change", () => { state.memory = at("memory").value; attempt(showDocuments); });
at("memory-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = at("new-memory").value.trim();
  if (!name) return;
  attempt(async () => {
    await api("/v1/memories", { method: "POST", body: JSON.stringify({ name }) });
    at("new-memory").value = "";
    await showMemories(name);
  });
});
at("files").addEventListener("change", () => attempt(() => upload([...at("files").files])));
const drop = at("drop");
for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.remove("over"); });
drop.addEventListener("drop", (event) => attempt(() => upload([...event.dataTransfer.files])));
at("ask-form").addEventListener("submit", (event) => { event.preventDefault(); attempt(ask); });
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); attempt(ask); }
});
at("stop").addEventListener("click", () => state.asking?.abort());
at("map").addEventListener("keydown", walk);
attempt(start);
