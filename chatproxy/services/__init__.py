"""What the service does, without knowing that browsers or HTTP servers exist."""
