"""Requests to servers with a protocol of OpenAI: the connection that judges and embedders share."""
