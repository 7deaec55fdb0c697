"""Many virtual clients and a coordinator in one process: the same code as over MQTT, on a MemoryBus."""
