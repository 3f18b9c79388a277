"""The wire contracts between trainer and reward servers, and the code generated from them."""
