// @microsoft/fetch-event-source lets go of the stream while its tab is hidden and asks again when it is shown. Two of its
// habits cost text: it drops a line break at the start of an event, and counts an event as seen before it is whole.
// `repaired` hands it whole events only, with a mark before each line that `onmessage` takes off.
import { fetchEventSource } from "@microsoft/fetch-event-source";

async function repaired(...request) {
  const response = await fetch(...request);
  if (!response.ok) return response;
  let rest = "";
  const repair = new TransformStream({
    transform(text, out) {
      const events = (rest + text).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n").map((line) => line.replace(/^data: /, "data: \0"));
        out.enqueue(lines.join("\n") + "\n\n");
      }
    },
  });
  const steps = [new TextDecoderStream(), repair, new TextEncoderStream()];
  return new Response(steps.reduce((body, step) => body.pipeThrough(step), response.body), response);
}

export async function ask(service, messages, onText, signal) {
  const key = crypto.getRandomValues(new Uint32Array(4)).join("-");
  let done = false;
  await fetchEventSource(`${service}/api/chat`, {
    method: "POST",
    headers: { "Content-Type": "application/json", "Idempotency-Key": key },
    body: JSON.stringify({ messages, resumable: true }),
    fetch: repaired,
    signal,
    async onopen(response) {
      if (!response.ok) throw Object.assign(new Error(), (await response.json()).error);
    },
    onmessage({ event, data }) {
      const text = data.split("\n").map((line) => line.slice(1)).join("\n");
      if (event === "error") throw Object.assign(new Error(), JSON.parse(text).error);
      if (text === "[DONE]") done = true;
      else if (!done) onText(text);
    },
    onclose() {
      if (!done) throw new Error("The connection was lost.");
    },
    onerror(error) {
      if (error.code) throw error; // the service's word is final; for anything else the library comes back
    },
  });
}
