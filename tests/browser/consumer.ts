// What a TypeScript page may write. The types of client.js are right if this compiles, and each marked line does not.
import { ask, ChatError, type Answer, type ChatEvent, type Message } from "../../chatproxy/browser/client.js";

const messages: Message[] = [{ role: "system", content: "Be brief." }, { role: "user", content: "Hi" }];

export async function page(signal: AbortSignal): Promise<string> {
  const answer: Answer = ask(messages, {
    service: "https://chat.example.com", token: "t", sessionId: "s", include: ["reasoning", "finish", "tools", "citations"],
    tools: ["web_search"], signal, resumable: true, headers: { "X-Tenant": "a" },
    onText: (text) => console.log(text.length), onReasoning: (text) => console.log(text.length), onEvent: show,
  });
  for await (const event of answer) show(event);
  answer.stop();
  const text: string = await ask("Hi").catch((error: unknown) => {
    if (error instanceof ChatError) return `${error.code} ${error.status} ${error.param ?? ""} ${error.requestId} ${error.retryAfter + 1}`;
    throw error;
  });
  return text;
}

function show(event: ChatEvent): void {
  if (event.type === "text" || event.type === "reasoning") console.log(event.text.length);
  else if (event.type === "tool") console.log(event.tool.length, event.status === "completed" ? event.query?.length : 0);
  else if (event.type === "citations") console.log(event.citations.map(({ url, title }) => title?.length ?? url.length));
  else if (event.type === "finish") console.log(event.finish_reason?.length, event.model?.length, event.usage?.completion_tokens);
  else console.log(event.error.code, event.seconds.toFixed());
}

// @ts-expect-error -- no such role
ask([{ role: "tool", content: "x" }]);
// @ts-expect-error -- no such event
ask("Hi", { include: ["usage"] });
// @ts-expect-error -- a number is no text
const wrong: Promise<number> = ask("Hi");
// @ts-expect-error -- only texts have a text
ask("Hi", { onEvent: (event) => event.text });
