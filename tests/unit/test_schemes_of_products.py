"""Hashes that the products themselves have made, with the version that made each."""

import pytest

from service.core.passwords.schemes import parse

PASSWORD = "correct horse battery staple \u00e9"
MADE = [
    (
        "django 5.2.19 pbkdf2_sha256",
        "django_pbkdf2",
        "pbkdf2_sha256$1000000$rA1ddwjGIK48eJfqCXLgNo$a9DlNwhVtoZajaVa0JEbD8WkJSUpjoh7/9VTFJIHGD8=",
    ),
    (
        "django 5.2.19 pbkdf2_sha1",
        "django_pbkdf2",
        "pbkdf2_sha1$1000000$FxJy1TrJep6vz1ldpVXqf6$utgQssSSt1B/m+tUEKGm72p0szk=",
    ),
    (
        "django 5.2.19 argon2",
        "argon2",
        "argon2$argon2id$v=19$m=102400,t=2,p=8$RVFOc2x1Y1RoclR6UWxidGhad3BNaA$N06Rkem/hja/c4hAztcZEqBYlgXzWbZAn8wWxsVxNL8",
    ),
    (
        "django 5.2.19 bcrypt_sha256",
        "django_bcrypt_sha256",
        "bcrypt_sha256$$2b$12$l8zdMMDAH4vgbH6QjJyDYO823xBxKy90fHeHilhMlNOpOxezsazpK",
    ),
    ("django 5.2.19 bcrypt", "bcrypt", "bcrypt$$2b$12$l7qkP1ypw51JrQhg7BjCTeth6fruMwAleeH/KRFf1KqoJy8rVOYPa"),
    (
        "django 5.2.19 scrypt",
        "django_scrypt",
        "scrypt$16384$1qn94oPyOHBueGi7LDFKZk$8$5$aSHg3b2+SYGOjgjs68B77XgAkMGK++bCe/RV32FUA5tlipBX5jVElSR/3dGbtAVAgOoyyp++OZgR4JpcSt6PTg==",
    ),
    ("django 5.2.19 md5", "django_digest", "md5$g8jeO3ieT1fprabGPIUH1i$b72381413ef758ade3d23b04feb7a276"),
    (
        "werkzeug 3.1.9 scrypt",
        "werkzeug_scrypt",
        "scrypt:32768:8:1$akjzcP0E1JquIQYd$40aaee59aab14bcd95ad90650f09cbcab4f190896ded5ee4d1b8f0c0bb56141d8a46dab221d3fd99c4596cb57f35dabb6f2a348dfd21a7cd01ceec8808b58a7a",
    ),
    (
        "werkzeug 3.1.9 pbkdf2",
        "werkzeug_pbkdf2",
        "pbkdf2:sha256:1000000$gWPAiVLKvlC0RloR$857fd37c85914837da08cf6256f586193f2755c7c6bf6ad495f4f6c986a908f5",
    ),
    (
        "werkzeug 3.1.9 pbkdf2:sha512:50000",
        "werkzeug_pbkdf2",
        "pbkdf2:sha512:50000$nVymrvtVhKR4Uymh$9dc1d48d53516dedadaf3171a5289829c329e695733c6c6daa83fbf1a6416345a6d4983e7f3304e9cd6cb309f38319dfc94eea1cbe106802d49a8de8e81f82d4",
    ),
    (
        "werkzeug 3.1.9 pbkdf2:sha1:1000",
        "werkzeug_pbkdf2",
        "pbkdf2:sha1:1000$WrgIt5SyEpcvOCfA$09f49f45b4ea0002c73470a9866d07994ca72742",
    ),
    (
        "argon2-cffi 25.1.0 id",
        "argon2",
        "$argon2id$v=19$m=65536,t=3,p=4$2F7ds6HgkoI+RIYNDz6snw$utmhOha2tf9Ov6e3qXsPk/Oh5XyC5MMaJe95ZLmY+MY",
    ),
    (
        "argon2-cffi 25.1.0 i",
        "argon2",
        "$argon2i$v=19$m=1024,t=2,p=4$EHarcRPrH+ULD3kgW6cFrQ$yQG7j0F13mxXcGvcqvVhp7ZiDw7qbLhZAOfQ94ZFGl8",
    ),
    ("libpass 1.9.4 pbkdf2_sha1", "pbkdf2", "$pbkdf2$131000$DSFEqNVai9HaW0sJwThnzA$DUJsKrEJdVHYjMh0GLCEFx3ruCk"),
    (
        "libpass 1.9.4 pbkdf2_sha256",
        "pbkdf2",
        "$pbkdf2-sha256$29000$Uyql1HpvTQlhrBWCUCoFwA$qbEzeBFpIbHlQeD3DRKPC7zpxgYUKLy1fGKWM35EYsg",
    ),
    (
        "libpass 1.9.4 pbkdf2_sha512",
        "pbkdf2",
        "$pbkdf2-sha512$25000$jpGytlbKmXNOKWUspTRmzA$f1q772zvsW.vpT0Dv5XP2S7cbSemvrTFRRhJcyx0mOX7YO593cW9bLARiyeXHEV6yfaAnPIb9MD6LSx.W10TnA",
    ),
    (
        "libpass 1.9.4 scrypt",
        "scrypt",
        "$scrypt$ln=16,r=8,p=1$au29d87Zu1fKuTcmREjJGQ$xCXuzhwQ7wqf8ec0hIO7fQ7Tfc6P+ww6rg+hMYO9rw8",
    ),
    (
        "libpass 1.9.4 sha512_crypt",
        "sha512_crypt",
        "$6$rounds=1000$OJ3l2Riu58suCfK3$oXpaCs6heJ65KHYzE4Aol94IBFynO2wBCNw1TvXFbQ2lTNoDknFFiDjI417ssskGTAvW.TO.YcFbdDGU9tfdf.",
    ),
    (
        "libpass 1.9.4 sha256_crypt",
        "sha256_crypt",
        "$5$rounds=1000$tIMB5NOAS6nAvklq$5pOHvbENa/VeWt.KBOGsHD/itAB3w/TkUYIvuCSVbyD",
    ),
    ("libpass 1.9.4 md5_crypt", "md5_crypt", "$1$JU4MVxbG$8OQuYkE9PGjc2pTYrN7DC/"),
    ("libpass 1.9.4 apr_md5_crypt", "apr1", "$apr1$KD5Ofrog$ho1NOfTKYM8l5NHWliCZE1"),
    ("libpass 1.9.4 phpass", "phpass", "$P$6FY3cHAGJlhp3vOFX4NlLLqVLDqGEU/"),
    ("libpass 1.9.4 ldap_salted_sha1", "ldap_digest", "{SSHA}mm4JMjH1bXZIQ68ND4eQmkhKe+tKScnZ"),
    (
        "libpass 1.9.4 ldap_salted_sha256",
        "ldap_digest",
        "{SSHA256}96yFkvz8VWuxHO96BFiTmf5mUEbcSU1b2srmq6/tpEcTglCKcW7NGQ==",
    ),
    (
        "libpass 1.9.4 ldap_salted_sha512",
        "ldap_digest",
        "{SSHA512}PBGpFqpRvPwyEl/uK+LvncmHA9LoCta/g7orsKhuHp/a73zVuVljDgZmwustjbI7asfeVKF2qvCA5l9l97z21tR6jzHmfE9p",
    ),
    ("libpass 1.9.4 ldap_salted_md5", "ldap_digest", "{SMD5}Gxo2Zjj47q0V2M3C4iFn1W2NcS4="),
    ("libpass 1.9.4 ldap_md5", "ldap_digest", "{MD5}mTqLRE3H3OwBffNAAejZIw=="),
    ("libpass 1.9.4 ldap_sha1", "ldap_digest", "{SHA}fg5p0F+EdMmBTSB39UcjGl/Emrw="),
    (
        "libpass 1.9.4 ldap_pbkdf2_sha256",
        "pbkdf2",
        "{PBKDF2-SHA256}29000$ea8VgjCm1FpLSWkNwfjfGw$kBPOtnik4Y4eJMEphUl2UPgY8zWTAiCQPQAwEiH2EM4",
    ),
    (
        "libpass 1.9.4 ldap_sha512_crypt",
        "sha512_crypt",
        "{CRYPT}$6$rounds=1000$ObHUukcRwaanEbq6$k4rB2Q8FPqF0S6FFXkYbrdR2ih3Leg2A5vksNH/j4805es2h1xV5Xa3awJv1Ko/sCbRuPfEiDrB.hGXd5AMLe0",
    ),
    (
        "libpass 1.9.4 django_pbkdf2_sha1",
        "django_pbkdf2",
        "pbkdf2_sha1$131000$IB7v2wrIZRLQ$4Ikw523nxlQxdUJACUHyHWs5jF0=",
    ),
    ("libpass 1.9.4 django_salted_sha1", "django_digest", "sha1$PisPvuIIfzrv$5db9508b5b91d650c44ca476288c2f57d7033bad"),
    (
        "libpass 1.9.4 bcrypt_sha256",
        "bcrypt_sha256",
        "$bcrypt-sha256$v=2,t=2b,r=12$h9zvd1PkzeFsC2MMZQbjq.$5iTmV.ilFicWaRJASncjEKgdOXlvhvG",
    ),
    (
        "libpass 1.9.4 bcrypt_sha256 v1",
        "bcrypt_sha256_v1",
        "$bcrypt-sha256$2b,4$APYFvbrYrgVBionfT541oO$50JiQr3Py.bbs8ex7OrIWNQHmqK3iGe",
    ),
    ("php 8.2.36 2y", "bcrypt", "$2y$04$K8dyindJsyRBgPmz.YBm2eFRqbMzED9aCaFkKgq8HcUGY.2cohyum"),
    (
        "php 8.2.36 argon2id",
        "argon2",
        "$argon2id$v=19$m=65536,t=4,p=1$bm1Vd25Fb1BCMTF0RHVsTA$bE3WRlN7FKEzDiccb5GYB9ihVGQsQ1G7Jrw4GGtn5v8",
    ),
    (
        "php 8.2.36 sha512",
        "sha512_crypt",
        "$6$rounds=1000$abcdefgh$W5yM1HGDVkLkB5Q/OHG1UIVOOPd7i.RFJwnrjf6yAl4sXIRe0IybfTBZ16OnsC8xqnM0ZVLq//kOYLxBiQlwu0",
    ),
    ("php 8.2.36 sha256", "sha256_crypt", "$5$saltsalt$8sv3m9K3UpPjsOBTOMiVNa5.c5v3xQSp4wN8Rnq/pw/"),
    ("php 8.2.36 md5", "md5_crypt", "$1$saltsalt$7VN7NopmgpKiKWnNonTNc0"),
    ("php 8.2.36 wp", "wordpress_bcrypt", "$wp$2y$04$wAD2HL3LfLve/AAct54wOuMNCwEUpws.js06PCgP5ZhVaja5H9ywi"),
    ("htpasswd 2.4.71 bcrypt", "bcrypt", "$2y$05$ioj/yOgbXuZQNw09yW04au9QN8XhinUK5umK3ozCrXD1yUQK0vpEO"),
    ("htpasswd 2.4.71 apr1", "apr1", "$apr1$JAwrQjmt$gAdkqmIMVWvIEMzoRPVSI."),
    ("htpasswd 2.4.71 sha", "ldap_digest", "{SHA}fg5p0F+EdMmBTSB39UcjGl/Emrw="),
    (
        "htpasswd 2.4.71 sha512",
        "sha512_crypt",
        "$6$t4RDVMh/VroC/SPZ$j3kffsVq6MLEIQil3eiaVsZpvHwSpQtMOkd3dqrM3GNyY2u7rjLcl1BzYJeqBZ4QTX1ml2Z.1DYTgYilu16dX/",
    ),
    ("htpasswd 2.4.71 sha256", "sha256_crypt", "$5$x6pgAfjhqNrYHM3H$ndZcZq8Pzb736IPgaZ9XKZunqmsP6uUQfV43huo3tH1"),
    (
        "openssl passwd -6",
        "sha512_crypt",
        "$6$woz/x9GMORru9fpL$NyN1vsNQbEc8KCLgYW0FZ6/WZj9t0N2n95mocGP34ReWn8xVFCXAAox/dZINjmPnwi4ta8wIlFlD80cbf.dUj1",
    ),
    ("openssl passwd -5", "sha256_crypt", "$5$tcB/12uFr6cRL/3L$pFAQ5uzq0hoMI9.6Opqq8RRMQNgwWayh2jg4SpORmj7"),
    ("openssl passwd -1", "md5_crypt", "$1$C9zZA/xd$qlWmJBorY3DbF3NjncaIZ0"),
    ("openssl passwd -apr1", "apr1", "$apr1$49CllLB5$2aYL6XtXdqd1eetep4tsU."),
]


@pytest.mark.parametrize("maker, scheme, text", MADE, ids=[maker for maker, *_ in MADE])
def test_a_hash_that_a_product_has_made_verifies(maker: str, scheme: str, text: str) -> None:
    """The right password is right, another one is wrong, and what is stored is read again."""
    parsed = parse(text)

    assert parsed.scheme == scheme
    assert parse(parsed.text).text == parsed.text
    assert parsed.verify(PASSWORD)
    assert not parsed.verify(PASSWORD + "x")
