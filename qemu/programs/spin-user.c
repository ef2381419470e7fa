/*
 * Busy in user mode for ever with a recognisable value in every register but
 * RSP and RIP.
 *
 * Byte k (from the most significant, 1-based) of the n-th general register is
 * n<<4 | k, so every byte says which register and which byte it is. Byte j of
 * XMMi is i<<4 | j.
 */
#include <asm/prctl.h>
#include <sys/syscall.h>

#include "planted.h"

#define FS_BASE 0x00005f5e5d5c5000ull
#define GS_BASE 0x00006f6e6d6c6000ull

static const char *const order[] = {
	"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8",
	"r9",  "r10", "r11", "r12", "r13", "r14", "r15",
};
#define GENERAL_REGISTERS (sizeof(order) / sizeof(order[0]))

uint8_t xmm_values[16][16] __attribute__((aligned(16)));

static uint64_t register_value(unsigned n)
{
	uint64_t value = 0;

	for (unsigned k = 1; k <= 8; k++)
		value = value << 8 | n << 4 | k;
	return value;
}

extern const char spin_loop[];

/* Never returns and calls nothing: the C library's TLS is gone by now. */
__attribute__((noreturn, naked)) static void load_registers_and_spin(void)
{
	__asm__ volatile(
		"lea xmm_values(%rip), %rax\n"
		"movdqa 0x00(%rax), %xmm0\n"
		"movdqa 0x10(%rax), %xmm1\n"
		"movdqa 0x20(%rax), %xmm2\n"
		"movdqa 0x30(%rax), %xmm3\n"
		"movdqa 0x40(%rax), %xmm4\n"
		"movdqa 0x50(%rax), %xmm5\n"
		"movdqa 0x60(%rax), %xmm6\n"
		"movdqa 0x70(%rax), %xmm7\n"
		"movdqa 0x80(%rax), %xmm8\n"
		"movdqa 0x90(%rax), %xmm9\n"
		"movdqa 0xa0(%rax), %xmm10\n"
		"movdqa 0xb0(%rax), %xmm11\n"
		"movdqa 0xc0(%rax), %xmm12\n"
		"movdqa 0xd0(%rax), %xmm13\n"
		"movdqa 0xe0(%rax), %xmm14\n"
		"movdqa 0xf0(%rax), %xmm15\n"
		"movabs $0x1112131415161718, %rax\n"
		"movabs $0x2122232425262728, %rbx\n"
		"movabs $0x3132333435363738, %rcx\n"
		"movabs $0x4142434445464748, %rdx\n"
		"movabs $0x5152535455565758, %rsi\n"
		"movabs $0x6162636465666768, %rdi\n"
		"movabs $0x7172737475767778, %rbp\n"
		"movabs $0x8182838485868788, %r8\n"
		"movabs $0x9192939495969798, %r9\n"
		"movabs $0xa1a2a3a4a5a6a7a8, %r10\n"
		"movabs $0xb1b2b3b4b5b6b7b8, %r11\n"
		"movabs $0xc1c2c3c4c5c6c7c8, %r12\n"
		"movabs $0xd1d2d3d4d5d6d7d8, %r13\n"
		"movabs $0xe1e2e3e4e5e6e7e8, %r14\n"
		"movabs $0xf1f2f3f4f5f6f7f8, %r15\n"
		".globl spin_loop\n"
		"spin_loop:\n"
		"	jmp spin_loop\n");
}

int main(int argc, char **argv)
{
	int cpu = argc > 1 ? atoi(argv[1]) : 1;

	name_thread("kstub-spin");
	pin_to_cpu(cpu);
	for (unsigned i = 0; i < 16; i++)
		for (unsigned j = 0; j < 16; j++)
			xmm_values[i][j] = i << 4 | j;

	printf("pid=%d\ncomm=kstub-spin\ncpu=%d\n", getpid(), cpu);
	for (unsigned n = 0; n < GENERAL_REGISTERS; n++)
		printf("%s=0x%016llx\n", order[n], (unsigned long long)register_value(n + 1));
	printf("rip=0x%llx\n", (unsigned long long)(uintptr_t)spin_loop);
	printf("fs_base=0x%016llx\ngs_base=0x%016llx\n", FS_BASE, GS_BASE);
	for (unsigned i = 0; i < 16; i++) {
		printf("xmm%u=", i);
		for (unsigned j = 0; j < 16; j++)
			printf("%02x", xmm_values[i][j]);
		printf("\n");
	}
	planted();

	CHECK(syscall(SYS_arch_prctl, ARCH_SET_GS, GS_BASE) == 0);
	/* From here on no C library call is safe: FS no longer points at TLS. */
	__asm__ volatile("syscall"
			 :
			 : "a"(SYS_arch_prctl), "D"(ARCH_SET_FS), "S"(FS_BASE)
			 : "rcx", "r11", "memory");
	load_registers_and_spin();
}
