"""The parts of the LLM stage: backbone, soft-token projection and splice, shared-prefix branches, list ranking."""
