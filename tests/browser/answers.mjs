// Node: node answers.mjs CLIENT SERVICE. For each number on its input it asks so many times at once, and prints what came.
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [client, service] = process.argv.slice(2);
const { ask } = await import(pathToFileURL(client));
for await (const line of createInterface({ input: process.stdin })) {
  const answers = Array.from({ length: Number(line) }, async () => {
    let text = "";
    const whole = await ask("Hi", { service, onText: (token) => { text += token; } });
    return [whole, text];
  });
  const settled = await Promise.allSettled(answers);
  console.log(JSON.stringify(settled.map(({ value, reason }) => value ?? String(reason?.code ?? reason))));
}
