"""The server's routes: OpenAI's images API, jobs, the page and its socket."""
