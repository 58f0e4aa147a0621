"""What the notification service reads from its environment, beside what all share."""

from __future__ import annotations

from pydantic import Field, SecretStr, field_validator

from chassis.settings import DatabaseSettings
from notify_svc.channels import SmtpServer
from notify_svc.rendering import address_of


class NotificationSettings(DatabaseSettings):
    """Settings of the notification service."""

    smtp_url: SecretStr
    """The mail server: `smtp://host:port`, `smtp://user:password@host:port?starttls`, or
    `smtps://user:password@host:port` for TLS from the start."""

    mail_from: str
    """Who mails come from, `Name <address>` or an address alone; the mail server reports
    what it cannot deliver to this address."""

    smtp_timeout_seconds: float = Field(default=20.0, gt=0, le=120)
    """How long sending one mail may take, waiting for a connection included."""

    smtp_connections_max: int = Field(default=4, ge=1, le=100)
    """Connections to the mail server at the most."""

    @field_validator("smtp_url")
    @classmethod
    def _is_smtp(cls, value: SecretStr) -> SecretStr:
        SmtpServer.from_url(value.get_secret_value())
        return value

    @field_validator("mail_from")
    @classmethod
    def _is_address(cls, value: str) -> str:
        address_of(value)
        return value

    @property
    def smtp_server(self) -> SmtpServer:
        """The mail server that `MESH_SMTP_URL` names."""
        return SmtpServer.from_url(self.smtp_url.get_secret_value())
