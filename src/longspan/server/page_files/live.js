// The stream of the server's state. Closed while nobody sees the page, so that it costs the server nothing.

/** Follow `live`; calls `onServer` with what does not change, `onState` with every state, `onLost` without a stream. */
export function follow({ onServer, onState, onLost }) {
  let source = null;
  let again = null;

  function open() {
    clearTimeout(again);
    if (source !== null || document.hidden) return;
    source = new EventSource("live");
    source.onmessage = (message) => {
      const event = JSON.parse(message.data);
      if (event.type === "server") onServer(event);
      else onState(event);
    };
    source.onerror = () => {
      onLost();
      if (source !== null && source.readyState === EventSource.CLOSED) {
        close(); // refused: the browser does not try again by itself
        again = setTimeout(open, 3000);
      }
    };
  }

  function close() {
    source?.close();
    source = null;
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  open();
}
