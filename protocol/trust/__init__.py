"""Who may say what: keys and signatures, the gate that every message passes, sealed updates."""
