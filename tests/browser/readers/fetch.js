// The plain reader: an answer in one connection. Aborting `signal` hangs up, and Grok is hung up with it.
export async function ask(service, messages, onText, signal) {
  const headers = { "Content-Type": "application/json" }, body = JSON.stringify({ messages });
  const response = await fetch(`${service}/api/chat`, { method: "POST", headers, body, signal });
  if (!response.ok) throw Object.assign(new Error(), (await response.json()).error);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer was cut off."); // only [DONE] proves that it is complete
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (event.startsWith("event: error")) throw Object.assign(new Error(), JSON.parse(data).error);
      if (data === "[DONE]") return;
      onText(data);
    }
  }
}
