"""Callers whom an identity provider names. Imported only where AUTH_JWKS_URL or AUTH_JWT_SECRET is set."""
