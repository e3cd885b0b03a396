// The page: wires the stream of the server's state to the parts that show it.

import { setServer } from "./chat.js";
import { showFigures } from "./figures.js";
import { seconds } from "./format.js";
import { follow } from "./live.js";
import { markLost, showMap } from "./map.js";
import { showRanks, showRequests, showStrategies } from "./tables.js";

const pill = document.getElementById("status");
const banner = document.getElementById("banner");
const WORDS = { ok: "running", recovering: "recovering", failed: "failed", disconnected: "no connection" };

let server = { page_size: 1 };
let status = "connecting";
let goodUntil = 0;

function showStatus(now, reason) {
  document.body.classList.toggle("lost", now !== "ok");
  const was = status;
  status = now;
  if (now !== was) {
    pill.dataset.status = now;
    pill.textContent = WORDS[now];
  }
  if (now === "recovering" || now === "failed") {
    const rank = /\brank (\d+)/.exec(reason ?? "");
    markLost(rank === null ? null : Number(rank[1]));
    const next = now === "recovering" ? "New ones are starting; requests wait, and go on by themselves." : "No request can be answered any more.";
    const text = `Ranks were lost: ${reason}. ${next}`;
    if (banner.textContent !== text) banner.textContent = text;
    banner.className = now === "failed" ? "banner bad" : "banner";
    banner.hidden = false;
  } else if (now === "disconnected") {
    banner.hidden = true;
  } else if (performance.now() > goodUntil) {
    banner.hidden = true;
  }
}

function onState(state) {
  const wasRecovering = status === "recovering";
  if (wasRecovering && state.status === "ok") {
    markLost(null);
    banner.textContent = `All ranks are back after ${seconds(state.last_recovery_s)}; requests go on.`;
    banner.className = "banner good";
    banner.hidden = false;
    goodUntil = performance.now() + 8000;
  }
  showStatus(state.status, state.reason);
  if (state.ranks === undefined) return; // only how the server is
  showFigures(state, server.page_size);
  showMap(state, server.page_size);
  showRanks(state);
  showRequests(state, server.page_size);
  showStrategies(state);
}

follow({
  onServer(event) {
    server = event;
    document.getElementById("model").textContent = event.model;
    document.getElementById("model").title = `longspan ${event.version}`;
    document.title = `${event.model} – longspan`;
    setServer(event);
  },
  onState,
  onLost: () => showStatus("disconnected", null),
});
