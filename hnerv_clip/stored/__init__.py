"""A stored video, `video.hnerv`: made from a run, played, searched, exported."""
