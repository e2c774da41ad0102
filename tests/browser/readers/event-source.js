// The browser's own reader, which resumes by itself. A POST starts the answer and tells its address; the prompt never
// travels in a URL.
export async function ask(service, messages, onText) {
  const headers = { "Content-Type": "application/json", Accept: "application/json" };
  const response = await fetch(`${service}/api/chat`, { method: "POST", headers, body: JSON.stringify({ messages }) });
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(), answer.error);
  const source = new EventSource(new URL(answer.url, service));
  return new Promise((resolve, reject) => {
    const end = (settle, value) => { source.close(); settle(value); };
    source.onmessage = ({ data }) => (data === "[DONE]" ? end(resolve) : onText(data));
    source.onerror = ({ data }) => {
      if (data) end(reject, Object.assign(new Error(), JSON.parse(data).error)); // the service's word
      else if (source.readyState === EventSource.CLOSED) reject(new Error("The answer is no longer there."));
      // else the connection was lost: the browser is on its way back, with the id of the last event it saw
    };
  });
}
