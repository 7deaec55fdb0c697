"""How the board is: its temperatures, power, memory and clocks, and when training has to wait for them."""
