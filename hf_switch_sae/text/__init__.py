"""Documents -> tokens: in windows for recording, in packed contexts for training."""

from hf_switch_sae.text.documents import Document, Documents, read_documents

__all__ = ["Document", "Documents", "read_documents"]
