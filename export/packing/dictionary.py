"""A preset dictionary for small .tflite files: what two small networks have in common with all others.

It holds the flatbuffers, without their weights, of two float networks of a few layers as TensorFlow Lite's converter
wrote them: tables, operator options, names. Deflate streams of codec 3 may refer back to it (RFC 1950's preset
dictionary). It is part of the format: changing a byte makes packed files unreadable.
"""

from __future__ import annotations

import base64
import functools
import zlib

_ENCODED = (
    b"c-pO4U1$_n6u$eDWE02Ds!OUh$hM?KMdD^n#h<iQ{6QsAQSqS<PR8tLmQHrl-B}w%iVspmY?0Q7Qu-(&R%jo5vOY)&eJD~=@FCa~ODnCkMWpzk"
    b"Z8p>I%$z$rGrMaNal@Cnd*`0-oO|!N=YC125aQ6z{&h)_5}jhHNQ#6|&=(U?v<3Qv_zZXi+`^X$;B1!=5qu8;2|=GW+lp-3@J(U6KA;^a>BSSd"
    b"{Bbp_AJfW)Y1>7C3zlWYxg7%vWplJ_s%gR8)W7;S%Zf7RyLwS8sivMU6^b+_4D|B2DR3>~_7Y&*zP*Qc95}dp-(GcK$Dys;w;tLGA5M%hj$4i$"
    b"$>r5zIdA4hboGQ@EaeJ$u^9cgmkTitn9GF7wg_<t2A6>IKp$`$W5$7-z;)mna0&PVxCof+;~~#s&|NQ@Z`>D4m)+ZJ_cgPfu;(rJBx<igd-S7E"
    b"@2<U?iSYcRwv`Z>?o7HHEBDTQ#}{$-bg%DDi|S|eXUj5yG2j$%8aM--1wLWBK@iXU;k35^dmcFL81D)BJi>h`G5hBnk39{;j=!8XE$*uo_JRK4"
    b"CzfRZlq&=MyAPzc74p~zQ_ptWK9e?6++7J;qd50do^1d}U)bRy&Jit_Ckt$um;iwRBtp(Ujq$u_+>IH_>U6?v?d1711@-}vza6r@JM&)%e2!d8"
    b"@-`+o4&qBcwJbR%!Z}M%47Yx$+ANng^e)Rb3a{+~H-_qb7w~*}y~AtB7mrskW(lu}!ZAwFBgC8$`;<EUG_S*!JNFRf-b$M*VgHU{<rI&-L>u$8"
    b"vhQY&^W{LCPA-ckI-48ZSZF>k`Svdyfb`eOHZitK+WB1NmvK|fYkX@^8@Fu7IChyAQGOq<j<ajkW4yQs^aBbo5pm9h0(>2Ia%~a@gTOSO_5I9u"
    b"<Uh+Ix&)uUc3#(A=tl_=2Tje?kCl!6TG7mzs4{wXn`RiB<X*}(z8v6*GtUL|FSqOIdu1KvN;A}+wON!y9nS&H94H$;o`(URg<O*-(Z43hbKEE#"
    b"MMJ~E(~j%vXrW-BW@oZQt!sJViIKSWO#8VN-s@iUud0o4)Es_4hd76DvTaVc%d;0v4C1>Q;HMn!r@D&%H-r2|T{X&h9?*^QX5Sm>PtDlPf>EY*"
    b"_xNmKkdGA=zt1+lUt;KgJ?L{p8}l!cHntyMGuc{h%Ds~T?pB^p7X5ueZg-U$Pbe@QUp~j#=fi-{7}t$S^uN;3XYD%4vm>!{#?RZrXEHtG)Nrks"
    b"Gl#puQ!=%@+3V2>9k#}hRY0D`4nC(zu8YlF=V*P-fb*?+<|^_bTOOhbsJVPLH>8)UcURc*$KJ%T|6Mosb#5Kn6tIi3U6)nQE@S&@<FO|Kwh^`+"
    b"tZUmNqMmUP_J1S55oV4{tfBlI)qIc~a{ZUO)wJ>Yhd587_7BcQt%g&*T8s)<)KeQ|?9Hrsw(~ja^4yi<mQxe)SvG-oE8oMU<5oKDm5>e=>!9dk"
    b")_3?UQtZ3H$$F()*CU;C(6Z-&`*iMBhlL3|N{3x7OTNzCsaW&TugWa?b;VB=dk*n{epNTt>eu#p=-2ox`jz(J)GEvo$aaNspM`DBN_X1h$lP@6"
    b"U5@=l=vFcK%~!u(`Esa{ZrwRm@#xk!e7g0?M8%p0#E%#Q!~g|2$u=pFUcOiH=~QxZgZt*9Q-9~NWcbfL&bw5dxuIZOfo8k*^!fEF>4z!cmylnt"
    b"k`I%$>Ll7{`HrA5-`CNcw3fa9R`p|q@5vBr&UzYBa?o=r+kD5hC8!m{%=2+oE5@Wwj=1~YBI|W1s1YM>9JPNRCOmpV>dBZ#`@U#R8S~u9WY^I^"
    b"Q%WuD#N6)29MqF79zEIYxqlUpo+Q1M#EY94cnav_VtfmM?E)TP;29td-16wi_0zSwjbcho&re5wP)DOtJ`LB=P_B~9xLR^^!}lahJiaI&{%oMv"
    b"?mWv^&n&)rYJJh)ZinmWG@APs^rvcl9Wyi&Mc3vk4Qr#iSIbi4avg0(Id%d4t84iJ%CElmi+RvIQ>()$j~~_1l~pB{@oTZ3+B=qbj@Hp)#NChn"
    b"*XGLYxx=Ie4?Txoqcb%A3=K$YzPN$@nw~{}?P;LDdY_@cw($Ob*g$`cHqc*T&S|p$wt?=t)<Abj-ItoD-s<(}t<)@fOWkN6bvGZpJo5iGUad9d"
    b"(O0CY*nh`dG}Zr643Av"
)


@functools.cache
def tflite_dictionary() -> bytes:
    """The dictionary: 5152 bytes, CRC-32 9b2309be."""
    return zlib.decompress(base64.b85decode(_ENCODED))
