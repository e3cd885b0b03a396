// Answers of the server as they come: text, thoughts, progress of long prompts, and counts at the end.

/** Yield the objects of a stream of server-sent events until its end mark. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the stream broke off");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Ask for an answer; yields {text}, {thought}, {progress} and at last {usage}. Throws an Error that says why. */
export async function* ask(server, messages, settings, signal) {
  const body = { model: server.model, stream: true, return_progress: true, stream_options: { include_usage: true }, ...settings };
  const path = server.has_chat_template ? "v1/chat/completions" : "v1/completions";
  if (server.has_chat_template) body.messages = messages;
  else body.prompt = messages.map((message) => message.content).join("");
  const response = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!response.ok) {
    const text = await response.text();
    let message = text.slice(0, 300);
    try {
      message = JSON.parse(text).error.message;
    } catch { /* no JSON: its text says it */ }
    throw new Error(message || `the server answers ${response.status}`);
  }
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.prompt_progress) yield { progress: event.prompt_progress };
    const choice = event.choices?.[0];
    const thought = choice?.delta?.reasoning_content;
    const text = choice?.delta?.content ?? choice?.text;
    if (thought) yield { thought };
    if (text) yield { text };
    if (event.usage) yield { usage: event.usage };
  }
}
