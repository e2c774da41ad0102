/** The types of client.js, which asks chatproxy and gives the answer as it is written. */

/** One message of the conversation. */
export interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}

/** What comes, in order. Joining the texts of type `text` gives the answer, exactly. */
export type ChatEvent =
  | { type: "text"; text: string }
  | { type: "reasoning"; text: string }
  | { type: "tool"; tool: string; status: "started" | "completed"; query?: string }
  | { type: "citations"; citations: { url: string; title?: string }[] }
  | { type: "finish"; finish_reason: string | null; model: string | null; usage: Record<string, any> | null; api?: string }
  /** A try has failed, as `error` says, and the next one begins in so many seconds. */
  | { type: "retry"; error: ChatError; seconds: number };

export interface Options {
  /** The service's address; where client.js was loaded from, if not given. */
  service?: string;
  /** Sent as `Authorization: Bearer`. */
  token?: string;
  /** Any stable name of the conversation; makes Grok's prompt cache hit. */
  sessionId?: string;
  /** Which events come besides `text` and `retry`; none, if not given. */
  include?: ("reasoning" | "finish" | "tools" | "citations")[];
  /** What Grok may use, such as `web_search`, if the service allows it. */
  tools?: string[];
  /** Stops; the answer then rejects with the signal's reason. */
  signal?: AbortSignal;
  onText?: (text: string) => void;
  /** Includes `reasoning`, unless `include` is given. */
  onReasoning?: (text: string) => void;
  /** An exception that one of these three throws stops the answer, which then rejects with it. */
  onEvent?: (event: ChatEvent) => void;
  /** False: a lost connection ends the answer, and the service keeps nothing of it. */
  resumable?: boolean;
  /** More request headers, which the service, or a proxy before it, must allow. */
  headers?: Record<string, string>;
}

/**
 * Await it for the whole text, or iterate over it for the events, as they come. Leaving the loop stops.
 * An async function that returns an Answer returns its text, as with any promise: put it into an object.
 */
export interface Answer extends Promise<string>, AsyncIterable<ChatEvent> {
  /** Stops here at once, and at Grok as soon as the answer has begun. It then rejects with the code `stopped`. */
  stop(): void;
}

/** Why there is no answer, or no more of it. */
export class ChatError extends Error {
  constructor(
    problem: { code: string; message: string; param?: string | null; request_id?: string },
    response?: Response,
  );
  /** One of the service's codes, or `connection_lost`, `stopped`, `not_an_event_stream`, `http_<status>`. */
  code: string;
  /** The HTTP status; 0 if there was none, or the answer had begun. */
  status: number;
  /** The field that is wrong, such as `messages[2].role`. */
  param: string | null;
  /** To be quoted to the service's operator. */
  requestId: string;
  /** Seconds to wait before asking again; 0 if not told. */
  retryAfter: number;
}

/**
 * Asks, at once. A lost connection is made again, for the rest of the same answer, and Grok is asked once. The answer
 * rejects with a ChatError if it is refused, fails, or is lost for good.
 *
 *     const text = await ask("Hi", { onText: (token) => output.append(token) });
 *
 *     for await (const event of ask(messages, { include: ["reasoning"] })) console.log(event);
 *
 * @param messages The conversation so far, or the one message of the user.
 */
export function ask(messages: string | Message[], options?: Options): Answer;
