"""`clipcast watch`: answers what comes into a folder, or what a camera sees."""
