"""The lab server: text -> embeddings -> broadcast -> collect -> aggregate -> broadcast."""
