"""Files by content hash: resumable downloads."""
