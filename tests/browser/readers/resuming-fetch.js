// Asked once, read over as many connections as it takes. `Idempotency-Key` makes it safe to ask again while nobody knows
// whether the first request arrived; after that, `Content-Location` is where the answer is.
export async function ask(service, messages, onText, signal) {
  const body = JSON.stringify({ messages, resumable: true });
  const key = crypto.getRandomValues(new Uint32Array(4)).join("-");
  const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
  let stream, lastEventId = "";
  for (let tries = 0; tries < 20; tries++) {
    if (tries) await new Promise((resolve) => setTimeout(resolve, Math.min(250 * 2 ** tries, 2000)));
    try {
      const response = stream
        ? await fetch(stream, { headers: { "Last-Event-ID": lastEventId }, signal })
        : await fetch(`${service}/api/chat`, { method: "POST", headers, body, signal });
      if (response.status !== 200) throw Object.assign(new Error(), (await response.json()).error);
      stream ??= new URL(response.headers.get("Content-Location"), service);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ; ) {
        const { done, value } = await reader.read();
        if (done) break;
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        for (const event of events) {
          const lines = event.split("\n");
          const field = (name) => lines.filter((line) => line.startsWith(name)).map((line) => line.slice(name.length)).join("\n");
          const data = field("data: ");
          lastEventId = field("id: ") || lastEventId;
          tries = 0;
          if (field("event: ") === "error") throw Object.assign(new Error(), JSON.parse(data).error);
          if (data === "[DONE]") return;
          onText(data);
        }
      }
    } catch (error) {
      if (error.code || signal?.aborted) throw error; // the service's word is final, anything else is a lost connection
    }
  }
  throw new Error("The connection was lost.");
}
