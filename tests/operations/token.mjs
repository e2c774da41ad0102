// A token for a signed-in user, from your own backend (Node, no packages). AUTH_JWT_SECRET is that of the service.
import { createHmac } from "node:crypto";

const encode = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");

export function token(user, secret = process.env.AUTH_JWT_SECRET) {
  const claims = { sub: user, exp: Math.floor(Date.now() / 1000) + 300 }; // good for five minutes
  const signed = `${encode({ alg: "HS256", typ: "JWT" })}.${encode(claims)}`;
  return `${signed}.${createHmac("sha256", secret).update(signed).digest("base64url")}`;
}
