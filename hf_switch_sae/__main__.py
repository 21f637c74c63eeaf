"""`python -m hf_switch_sae`, and under a launcher `accelerate launch -m hf_switch_sae`."""

from hf_switch_sae.cli import main

if __name__ == "__main__":
    main()
