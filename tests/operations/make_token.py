"""A token for a signed-in user, from your own backend (no packages). AUTH_JWT_SECRET is that of the service."""

import base64
import hmac
import json
import time


def token(user: str, secret: str) -> str:
    """Good for five minutes."""
    parts = [{"alg": "HS256", "typ": "JWT"}, {"sub": user, "exp": int(time.time()) + 300}]
    signed = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    signature = hmac.digest(secret.encode(), signed.encode(), "sha256")
    return f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"
