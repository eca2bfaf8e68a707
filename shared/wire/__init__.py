"""The only place that knows bytes on the wire: envelope, messages, topics, frames, columns."""
