"""The conversation with xAI: the only part that knows httpx and Grok's wire."""
