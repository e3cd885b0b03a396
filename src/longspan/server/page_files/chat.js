// The chat: a conversation in this page's memory, files in front of a message, and answers as they come.

import { ask } from "./answers.js";
import { element, number, plural, rate, seconds } from "./format.js";
import { render } from "./markdown.js";

const get = (id) => document.getElementById(id);
const [card, log, form, box, send, stop] = ["chat-card", "log", "composer", "message", "send", "stop"].map(get);

let server = null;
let messages = []; // of the conversation, without the system prompt
let files = []; // {name, text}, in front of the next message
let running = null; // AbortController of the answer that comes

/** Take down which server this is. */
export function setServer(event) {
  server = event;
  box.placeholder = event.has_chat_template ? "Message" : "Text to continue";
  if (!event.has_chat_template && get("welcome")) {
    get("welcome").replaceChildren(
      element("p", {}, element("b", {}, "This model has no chat template."),
        " Your text is continued as it is. Drop a text file here, as long as you like: you see how far it is read."),
    );
  }
}

// -- files -------------------------------------------------------------------------------------------------------------

function showFiles() {
  get("files").replaceChildren(...files.map((file) => {
    const remove = element("button", { type: "button", className: "quiet", onclick: () => {
      files = files.filter((other) => other !== file);
      showFiles();
      box.focus();
    } }, "×");
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    return element("li", {}, `${file.name}, ${number(file.text.length)} characters`, remove);
  }));
}

async function take(list) {
  for (const file of list) {
    const text = await file.text();
    if (text.includes("\u0000")) say(element("p", { className: "error" }, `${file.name} is no text file.`));
    else files.push({ name: file.name, text });
  }
  showFiles();
  box.focus();
}

get("attach").addEventListener("click", () => get("picker").click());
get("picker").addEventListener("change", (event) => {
  take([...event.target.files]);
  event.target.value = "";
});
for (const name of ["dragenter", "dragover"]) {
  card.addEventListener(name, (event) => {
    event.preventDefault();
    card.classList.add("dropping");
  });
}
card.addEventListener("dragleave", (event) => {
  if (!card.contains(event.relatedTarget)) card.classList.remove("dropping");
});
card.addEventListener("drop", (event) => {
  event.preventDefault();
  card.classList.remove("dropping");
  take([...event.dataTransfer.files]);
});

// -- turns -------------------------------------------------------------------------------------------------------------

function say(...content) {
  get("welcome")?.remove();
  const turn = element("div", { className: "turn assistant" }, ...content);
  log.append(turn);
  log.scrollTop = log.scrollHeight;
  return turn;
}

function sayUser(text, attached) {
  get("welcome")?.remove();
  const chips = attached.map((file) => element("span", { className: "file" }, `${file.name}, ${number(file.text.length)} characters`));
  log.append(element("div", { className: "turn user" }, ...chips, chips.length ? element("br") : null, text));
}

class AnswerView {
  constructor() {
    this.bar = element("i");
    this.status = element("span", { className: "note" }, "waiting");
    this.reading = element("div", { className: "reading" }, element("span", { className: "bar" }, this.bar), this.status);
    this.thoughts = element("div", { className: "thoughts", hidden: true });
    this.body = element("div", { className: "text" });
    this.counts = element("p", { className: "counts" });
    this.turn = say(this.reading, this.thoughts, this.body, this.counts);
    this.turn.setAttribute("aria-busy", "true");
    this.text = "";
    this.started = performance.now();
    this.first = null;
    this.isDue = false;
  }

  progress(progress) {
    const { total, processed, cache, time_left_ms: left, time_ms: passed } = progress;
    this.bar.style.width = `${(100 * processed) / total}%`;
    const parts = [`reading ${number(processed)} of ${number(total)} tokens`];
    if (cache) parts.push(`${number(cache)} cached`);
    if (passed > 0 && processed > cache) parts.push(`${rate((1000 * (processed - cache)) / passed)} tokens/s`);
    if (left) parts.push(`${seconds(left / 1000)} left`);
    if (progress.recovering) parts.unshift("ranks were lost, reading again");
    this.status.textContent = parts.join(" · ");
  }

  begin() {
    this.first ??= performance.now();
    this.reading.hidden = true;
  }

  thought(text) {
    this.begin();
    this.thoughts.hidden = false;
    this.thoughts.textContent += text;
  }

  add(text) {
    this.begin();
    this.text += text;
    if (this.isDue) return;
    this.isDue = true;
    setTimeout(() => { // several tokens, one drawing; also where the page is not seen
      this.isDue = false;
      this.draw();
    }, 30);
  }

  draw() {
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    this.body.replaceChildren(...render(this.text));
    if (follows) log.scrollTop = log.scrollHeight;
  }

  end(usage, error) {
    this.reading.hidden = true;
    this.draw();
    this.turn.removeAttribute("aria-busy");
    const now = performance.now();
    const parts = [];
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      parts.push(plural(usage.prompt_tokens, "prompt token") + (cached ? ` (${number(cached)} cached)` : ""));
      parts.push(plural(usage.completion_tokens, "token"));
      if (this.first !== null) parts.push(`first after ${seconds((this.first - this.started) / 1000)}`);
      const later = (now - this.first) / 1000;
      if (this.first !== null && usage.completion_tokens > 1 && later > 0) parts.push(`${rate((usage.completion_tokens - 1) / later)} tokens/s`);
    }
    if (error?.name === "AbortError") parts.unshift("stopped");
    else if (error) this.turn.append(element("p", { className: "error", role: "alert" }, error.message));
    this.counts.textContent = parts.join(" · ");
    log.scrollTop = log.scrollHeight;
  }
}

function settings() {
  const found = {};
  if (get("temperature").value !== "") found.temperature = Number(get("temperature").value);
  if (get("max-tokens").value !== "") found.max_tokens = Number(get("max-tokens").value);
  else if (!server.has_chat_template) found.max_tokens = 64;
  return found;
}

async function answer(text) {
  const attached = files;
  files = [];
  showFiles();
  sayUser(text, attached);
  const content = [...attached.map((file) => file.text), text].join("\n\n");
  const before = server.has_chat_template ? messages : [];
  const system = get("system").value.trim();
  const asked = [...(system && server.has_chat_template ? [{ role: "system", content: system }] : []), ...before, { role: "user", content }];
  const view = new AnswerView();
  running = new AbortController();
  [send.hidden, stop.hidden] = [true, false];
  let [usage, failure] = [null, null];
  try {
    for await (const piece of ask(server, asked, settings(), running.signal)) {
      if (piece.progress) view.progress(piece.progress);
      if (piece.thought) view.thought(piece.thought);
      if (piece.text) view.add(piece.text);
      usage = piece.usage ?? usage;
    }
  } catch (error) {
    failure = error;
  }
  view.end(usage, failure);
  const isSame = before === messages || !server.has_chat_template; // and no new chat has begun meanwhile
  if (isSame && (view.text || failure === null)) messages = [...before, { role: "user", content }, { role: "assistant", content: view.text }];
  running = null;
  [send.hidden, stop.hidden] = [false, true];
  box.focus({ preventScroll: true });
}

// -- the form ----------------------------------------------------------------------------------------------------------

function grow() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = box.value;
  if (!text.trim() || running !== null || server === null) return;
  box.value = "";
  grow();
  answer(text);
});
box.addEventListener("input", grow);
box.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => running?.abort());
get("new-chat").addEventListener("click", () => {
  running?.abort();
  messages = [];
  files = [];
  showFiles();
  log.replaceChildren();
  box.focus();
});
